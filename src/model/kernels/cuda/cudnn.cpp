// Handle, running and dropping of plans, and attention (SDPA) in bf16 and e4m3.
#include "cudnn.hpp"

using namespace lq;

extern "C" {

size_t lq_cudnn_version() { return cudnnGetVersion(); }

const char *lq_cudnn_error() { return error().c_str(); }

// A handle whose work goes to `stream`; none and a text on failure.
void *lq_cudnn_open(void *stream) {
    cudnnHandle_t handle = nullptr;
    auto status = cudnnCreate(&handle);
    if (status == CUDNN_STATUS_SUCCESS) status = cudnnSetStream(handle, (cudaStream_t)stream);
    if (status != CUDNN_STATUS_SUCCESS) {
        error() = cudnnGetErrorString(status);
        return nullptr;
    }
    return handle;
}

void lq_cudnn_close(void *handle) { cudnnDestroy((cudnnHandle_t)handle); }

int64_t lq_plan_workspace(const void *plan) { return ((const Plan *)plan)->workspace; }

void lq_plan_drop(void *plan) { delete (Plan *)plan; }

// Runs a plan on `count` operands: uid[i] lies at address[i].
int lq_plan_run(void *handle, void *plan, const int64_t *uid, void *const *address, int count, void *workspace) {
    std::unordered_map<int64_t, void *> pack;
    for (int i = 0; i < count; i++) pack[uid[i]] = address[i];
    auto status = ((Plan *)plan)->graph->execute((cudnnHandle_t)handle, pack, workspace);
    if (status.is_good()) return 0;
    error() = status.get_message();
    return 1;
}

// Attention of queries [batch, queries, heads, width] over keys and values [batch, keys, heads, width].
//
// uid: 1 q, 2 k, 3 v, 4 result; with `masked` 5 and 6, the numbers of queries and keys that count (i32 [batch]); with
// `fp8` 7…12, the f32 scalars what a stored q, k, v is worth, what a stored softmax value is worth, its inverse, and by
// what the result is multiplied before it is stored, and 13, 14 for the largest values that cuDNN insists on telling.
void *lq_attention_plan(void *handle, int fp8, int masked, int64_t batch, int64_t heads, int64_t queries, int64_t keys,
                        int64_t width, float scale) {
    auto type = fp8 ? fe::DataType_t::FP8_E4M3 : fe::DataType_t::BFLOAT16;
    auto graph = std::make_shared<fe::graph::Graph>();
    graph->set_io_data_type(type)
        .set_intermediate_data_type(fe::DataType_t::FLOAT)
        .set_compute_data_type(fe::DataType_t::FLOAT);
    auto rows = [&](int64_t uid, int64_t n) {
        return graph->tensor(fe::graph::Tensor_attributes()
                                 .set_uid(uid)
                                 .set_dim({batch, heads, n, width})
                                 .set_stride({n * heads * width, width, heads * width, 1}));
    };
    auto scalar = [&](int64_t uid, fe::DataType_t of, int64_t n) {
        return graph->tensor(
            fe::graph::Tensor_attributes().set_uid(uid).set_dim({n, 1, 1, 1}).set_stride({1, 1, 1, 1}).set_data_type(of));
    };
    auto q = rows(1, queries), k = rows(2, keys), v = rows(3, keys);
    auto options = fe::graph::SDPA_attributes().set_name("attention").set_generate_stats(false).set_attn_scale(scale);
    if (masked)
        options.set_padding_mask(true)
            .set_seq_len_q(scalar(5, fe::DataType_t::INT32, batch))
            .set_seq_len_kv(scalar(6, fe::DataType_t::INT32, batch));
    Tensor out;
    if (fp8) {
        auto one = [&](int64_t uid) { return scalar(uid, fe::DataType_t::FLOAT, 1); };
        auto all = graph->sdpa_fp8(q, k, v, one(7), one(8), one(9), one(10), one(11), one(12), options);
        out = all[0];
        for (int i = 2; i < 4; i++)
            all[i]->set_output(true).set_uid(11 + i).set_dim({1, 1, 1, 1}).set_stride({1, 1, 1, 1}).set_data_type(
                fe::DataType_t::FLOAT);
    } else {
        out = graph->sdpa(q, k, v, options)[0];
    }
    out->set_output(true)
        .set_uid(4)
        .set_dim({batch, heads, queries, width})
        .set_stride({queries * heads * width, width, heads * width, 1})
        .set_data_type(type);
    return finish((cudnnHandle_t)handle, graph);
}
}

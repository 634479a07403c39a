// Convolutions over video and the products of the video autoencoder's attention, by cuDNN; channels last.
//
// A convolution over 1 frame and one over 12 must round alike, or streaming would not equal one pass bit for bit. So the
// engine is chosen once for a layer and a picture size, by timing cuDNN's list on a block of `reference` frames and looking
// at what becomes of a frame alone, and every other number of frames runs on the engine of the same name.
#include "cudnn.hpp"

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdio>
#include <map>
#include <mutex>
#include <random>
#include <tuple>
#include <vector>

using namespace lq;

namespace {

// Numbers of a convolution: channels in and out, picture, kernel, padding in front and behind, strides; f32 or bf16.
struct Shape {
    int64_t cin, cout, height, width, kt, ks, before, behind, stride_t, stride_s, wide;
    auto key(int device) const {
        return std::make_tuple(device, cin, cout, height, width, kt, ks, before, behind, stride_t, stride_s, wide);
    }
    int64_t bytes() const { return wide ? 4 : 2; }
    int64_t frames_out(int64_t frames) const { return (frames - kt) / stride_t + 1; }
    int64_t side(int64_t n) const { return (n + before + behind - ks) / stride_s + 1; }
};

using Key = decltype(Shape().key(0));

std::shared_ptr<fe::graph::Graph> convolution(const Shape &s, int64_t frames) {
    auto graph = std::make_shared<fe::graph::Graph>();
    graph->set_io_data_type(s.wide ? fe::DataType_t::FLOAT : fe::DataType_t::BFLOAT16)
        .set_intermediate_data_type(fe::DataType_t::FLOAT)
        .set_compute_data_type(fe::DataType_t::FLOAT);
    const int64_t h = s.height, w = s.width, c = s.cin, plane = h * w * c;
    auto options = fe::graph::Conv_fprop_attributes().set_name("convolution");
    auto x = fe::graph::Tensor_attributes().set_uid(1), kernel = fe::graph::Tensor_attributes().set_uid(2);
    const int64_t k = s.ks, oh = s.side(h), ow = s.side(w), out = s.frames_out(frames);
    if (s.kt == 1) { // every frame for itself: a batch of pictures
        x.set_dim({frames, c, h, w}).set_stride({plane, 1, w * c, c});
        kernel.set_dim({s.cout, c, k, k}).set_stride({k * k * c, 1, k * c, c});
        options.set_pre_padding({s.before, s.before}).set_post_padding({s.behind, s.behind});
        options.set_stride({s.stride_s, s.stride_s}).set_dilation({1, 1});
    } else {
        x.set_dim({1, c, frames, h, w}).set_stride({frames * plane, 1, plane, w * c, c});
        kernel.set_dim({s.cout, c, s.kt, k, k}).set_stride({s.kt * k * k * c, 1, k * k * c, k * c, c});
        options.set_pre_padding({0, s.before, s.before}).set_post_padding({0, s.behind, s.behind});
        options.set_stride({s.stride_t, s.stride_s, s.stride_s}).set_dilation({1, 1, 1});
    }
    auto y = graph->conv_fprop(graph->tensor(x), graph->tensor(kernel), options);
    const int64_t n = s.cout;
    y->set_output(true).set_uid(3);
    if (s.kt == 1)
        y->set_dim({frames, n, oh, ow}).set_stride({oh * ow * n, 1, ow * n, n});
    else
        y->set_dim({1, n, out, oh, ow}).set_stride({out * oh * ow * n, 1, oh * ow * n, ow * n, n});
    return graph;
}

// Ready for its plans to be built one by one.
bool prepare(cudnnHandle_t handle, fe::graph::Graph &graph) {
    auto status = graph.validate();
    if (status.is_good()) status = graph.build_operation_graph(handle);
    if (status.is_good()) status = graph.create_execution_plans({fe::HeurMode_t::A, fe::HeurMode_t::FALLBACK});
    if (status.is_bad()) error() = status.get_message();
    return status.is_good();
}

// Memory for a moment.
struct Room {
    void *at = nullptr;
    explicit Room(size_t bytes) {
        if (cudaMalloc(&at, bytes ? bytes : 1) != cudaSuccess) at = nullptr;
    }
    ~Room() { cudaFree(at); }
};

// Random numbers between ±2^-7 and ±2, in either type: with equal ones the card draws less power, and others are fastest.
void fill(void *at, size_t bytes, cudaStream_t stream) {
    std::vector<uint16_t> some(1 << 16);
    std::mt19937 random(std::random_device{}());
    for (auto &n : some) n = 0x3c00 | (random() & 0x83ff);
    size_t done = std::min(bytes, 2 * some.size());
    cudaMemcpyAsync(at, some.data(), done, cudaMemcpyHostToDevice, stream);
    for (; done < bytes; done *= 2)
        cudaMemcpyAsync((char *)at + done, at, std::min(done, bytes - done), cudaMemcpyDeviceToDevice, stream);
}

// Appends the plan of this name, `eng62_k2=4_k13=0`: an engine and its knobs.
bool append(fe::graph::Graph &graph, const std::string &name) {
    long engine, value;
    int type, length = 0;
    if (sscanf(name.c_str(), "eng%ld%n", &engine, &length) != 1) return false;
    std::unordered_map<fe::KnobType_t, int64_t> knobs;
    for (auto at = name.c_str() + length; sscanf(at, "_k%d=%ld%n", &type, &value, &length) == 2; at += length)
        knobs[fe::convert_from_backend_knob_type((cudnnBackendKnobType_t)type)] = value;
    return graph.create_execution_plan(engine, knobs).is_good();
}

// Builds the plan of this name: from cuDNN's list, or made after the name, because other numbers of frames have other lists.
// Its index, or -1.
int64_t build(cudnnHandle_t handle, fe::graph::Graph &graph, const std::string &name, int64_t most_room) {
    const auto fits = [&](int64_t i) {
        return graph.build_plan_at_index(handle, i).is_good() && graph.get_workspace_size_plan_at_index(i) <= most_room;
    };
    const int64_t listed = graph.get_execution_plan_count();
    for (int64_t i = 0; i < listed; i++) {
        std::string its;
        if (graph.get_plan_name_at_index(i, its).is_good() && its == name && fits(i)) return i;
    }
    return append(graph, name) && listed < graph.get_execution_plan_count() && fits(listed) ? listed : -1;
}

// Memory of the card for one choice.
struct Operands {
    size_t in, weights, out; // bytes: of a frame, of the kernel, of a frame of the result
    Room x, w, y, alone, room;

    Operands(const Shape &s, int64_t frames, int64_t most_room)
        : in(s.height * s.width * s.cin * s.bytes()), weights(s.cout * s.cin * s.kt * s.ks * s.ks * s.bytes()),
          out(s.side(s.height) * s.side(s.width) * s.cout * s.bytes()), x(frames * in), w(weights),
          y(s.frames_out(frames) * out), alone(out), room(most_room) {}
    bool there() const { return x.at && w.at && y.at && alone.at && room.at; }
};

// Whether an engine gives the last frame the same bits alone as among `frames`, as far as the beginning of it tells.
bool rounds_alike(cudnnHandle_t handle, cudaStream_t stream, const Shape &s, int64_t frames, const std::string &name,
                  const Operands &o, int64_t most_room) {
    const int64_t last = s.frames_out(frames) - 1;
    if (last == 0) return true;
    auto run = [&](int64_t n, char *x, void *y) {
        auto graph = convolution(s, n);
        if (!prepare(handle, *graph)) return false;
        const int64_t i = build(handle, *graph, name, most_room);
        std::unordered_map<int64_t, void *> operands{{1, x}, {2, o.w.at}, {3, y}};
        return i >= 0 && graph->execute_plan_at_index(handle, operands, o.room.at, i).is_good();
    };
    if (!run(frames, (char *)o.x.at, o.y.at)) return false;
    if (!run(s.kt, (char *)o.x.at + last * s.stride_t * o.in, o.alone.at)) return false;
    std::vector<char> among(std::min<size_t>(o.out, 4 << 20)), alone(among.size());
    cudaMemcpyAsync(among.data(), (char *)o.y.at + last * o.out, among.size(), cudaMemcpyDeviceToHost, stream);
    cudaMemcpyAsync(alone.data(), o.alone.at, alone.size(), cudaMemcpyDeviceToHost, stream);
    return cudaStreamSynchronize(stream) == cudaSuccess && among == alone;
}

// Of engines without tensor cores the first few of cuDNN's list are timed: one of them takes a second for a large picture.
constexpr int FIRST = 6;

// The name of the fastest engine that rounds alike, or of the fastest: of all with tensor cores, or of cuDNN's shortlist.
// Empty when none can be built.
std::string fastest(cudnnHandle_t handle, const Shape &s, int64_t frames, int64_t most_room, bool tensor_cores) {
    auto graph = convolution(s, frames);
    if (!prepare(handle, *graph)) return "";
    if (tensor_cores) graph->select_numeric_notes({fe::NumericalNote_t::TENSOR_CORE});
    const Operands o(s, frames, most_room);
    if (!o.there()) return "";
    cudaStream_t stream = nullptr;
    cudnnGetStream(handle, &stream);
    std::unordered_map<int64_t, void *> operands{{1, o.x.at}, {2, o.w.at}, {3, o.y.at}};
    fill(o.x.at, frames * o.in, stream), fill(o.w.at, o.weights, stream);
    cudaEvent_t begin, end;
    cudaEventCreate(&begin);
    cudaEventCreate(&end);
    std::vector<std::pair<float, std::string>> timed;
    float least = 1e30f;
    const int64_t count = graph->get_execution_plan_count();
    for (int64_t i = 0, tried = 0; i < count && (tensor_cores || tried < FIRST); i++) {
        if (graph->build_plan_at_index(handle, i).is_bad()) continue;
        if (graph->get_workspace_size_plan_at_index(i) > most_room) continue;
        tried++;
        float time = 1e30f;
        for (int run = 0; run < 4 && (run < 2 || time < 2 * least); run++) {
            cudaEventRecord(begin, stream);
            if (graph->execute_plan_at_index(handle, operands, o.room.at, i).is_bad()) break;
            cudaEventRecord(end, stream);
            if (cudaEventSynchronize(end) != cudaSuccess) break;
            float now = 1e30f;
            cudaEventElapsedTime(&now, begin, end);
            if (run > 0) time = std::min(time, now); // the first may bring the kernel to the card
        }
        least = std::min(least, time);
        std::string name;
        if (time < 1e30f && graph->get_plan_name_at_index(i, name).is_good()) timed.emplace_back(time, name);
    }
    cudaEventDestroy(begin);
    cudaEventDestroy(end);
    std::sort(timed.begin(), timed.end());
    for (const auto &[time, name] : timed)
        if (rounds_alike(handle, stream, s, frames, name, o, most_room)) return name;
    return timed.empty() ? "" : timed[0].second;
}

} // namespace

extern "C" {

// A convolution of `frames` frames [frames, height, width, cin] with [cout, kt, ks, ks, cin] (uid 1, 2) to uid 3. In
// time nothing is padded. None and a text when cuDNN has no way.
void *lq_convolution_plan(void *handle_, const int64_t *numbers, int64_t frames, int64_t reference, int64_t most_room) {
    static std::mutex lock;
    static std::map<Key, std::string> chosen;
    auto handle = (cudnnHandle_t)handle_;
    Shape s{numbers[0], numbers[1], numbers[2], numbers[3], numbers[4],
            numbers[5], numbers[6], numbers[7], numbers[8], numbers[9], numbers[10]};
    int device = 0;
    cudaGetDevice(&device);
    std::string name;
    {
        std::lock_guard<std::mutex> guard(lock);
        auto found = chosen.find(s.key(device));
        if (found == chosen.end()) {
            name = s.wide ? "" : fastest(handle, s, reference, most_room, true);
            if (name.empty()) name = fastest(handle, s, reference, most_room, false);
            found = chosen.emplace(s.key(device), name).first;
        }
        name = found->second;
    }
    auto graph = convolution(s, frames);
    if (!prepare(handle, *graph)) return nullptr;
    int64_t at = build(handle, *graph, name, most_room);
    // What works is better than nothing, even if it rounds differently.
    for (int64_t i = 0; at < 0 && i < graph->get_execution_plan_count(); i++)
        if (graph->build_plan_at_index(handle, i).is_good() && graph->get_workspace_size_plan_at_index(i) <= most_room) at = i;
    if (at >= 0) {
        const int64_t workspace = graph->get_workspace_size_plan_at_index(at);
        return new Plan{std::move(graph), workspace};
    }
    error() = "no engine for this convolution";
    return nullptr;
}

// `c = a · b`, [rows, depth] · [depth, columns], from bf16; rows of `a` stand `a_step` apart. `b` is read as [columns,
// depth] with rows `b_step` apart when `turned`, else as [depth, columns]. `c` is f32 when `wide`, else bf16.
void *lq_product_plan(void *handle, int turned, int wide, int64_t rows, int64_t depth, int64_t columns, int64_t a_step,
                      int64_t b_step, int64_t c_step) {
    auto graph = std::make_shared<fe::graph::Graph>();
    graph->set_io_data_type(fe::DataType_t::BFLOAT16)
        .set_intermediate_data_type(fe::DataType_t::FLOAT)
        .set_compute_data_type(fe::DataType_t::FLOAT);
    auto a = graph->tensor(
        fe::graph::Tensor_attributes().set_uid(1).set_dim({1, rows, depth}).set_stride({rows * a_step, a_step, 1}));
    auto b_stride = turned ? std::vector<int64_t>{columns * b_step, 1, b_step} : std::vector<int64_t>{depth * b_step, b_step, 1};
    auto b = graph->tensor(fe::graph::Tensor_attributes().set_uid(2).set_dim({1, depth, columns}).set_stride(b_stride));
    auto c = graph->matmul(a, b, fe::graph::Matmul_attributes().set_name("product"));
    c->set_output(true)
        .set_uid(3)
        .set_dim({1, rows, columns})
        .set_stride({rows * c_step, c_step, 1})
        .set_data_type(wide ? fe::DataType_t::FLOAT : fe::DataType_t::BFLOAT16);
    return finish((cudnnHandle_t)handle, graph);
}
}

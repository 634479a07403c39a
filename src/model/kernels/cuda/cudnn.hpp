// A C door to the cuDNN frontend: one handle per device context, plans that are built once, errors as text.
#pragma once
#include <cudnn_frontend.h>

#include <cstring>
#include <memory>
#include <string>
#include <unordered_map>

namespace lq {
namespace fe = cudnn_frontend;

using Tensor = std::shared_ptr<fe::graph::Tensor_attributes>;

// The last failure of this thread, read by lq_cudnn_error.
inline std::string &error() {
    thread_local std::string text;
    return text;
}

// A built graph. Operands are known by small numbers (uid).
struct Plan {
    std::shared_ptr<fe::graph::Graph> graph;
    int64_t workspace = 0;
};

// Builds `graph` with the best engine cuDNN's heuristics name; none and a text on failure.
inline Plan *finish(cudnnHandle_t handle, std::shared_ptr<fe::graph::Graph> graph) {
    auto status = graph->build(handle, {fe::HeurMode_t::A});
    int64_t workspace = 0;
    if (status.is_good()) status = graph->get_workspace_size(workspace);
    if (status.is_bad()) {
        error() = status.get_message();
        return nullptr;
    }
    return new Plan{std::move(graph), workspace};
}
} // namespace lq

// The experts of one MoE layer as llama.cpp's build_moe_ffn spells them, over caller's memory.
//
// Weights are gate_up [E, 2I, H] and down [E, H, I] in memory that outlives the layer; x and y
// are float32 [T, H]. Every function of this file is for one thread at a time.

#include <cstdint>
#include <initializer_list>

#include "ggml-alloc.h"
#include "ggml-backend.h"
#include "ggml-cpu.h"
#include "ggml.h"

namespace {

struct Layer {
    int64_t hidden, inner;
    ggml_context * context;
    ggml_backend_t backend;
    ggml_threadpool * pool;
    ggml_backend_buffer_t buffers[2];
    ggml_tensor *gate_up, *down;
};

struct Graph {
    ggml_context * context;
    ggml_gallocr_t memory;
    ggml_cgraph * graph;
    ggml_tensor *x, *ids, *weights, *y;
};

ggml_backend_buffer_t place(ggml_tensor * tensor, void * data) {
    ggml_backend_buffer_t buffer = ggml_backend_cpu_buffer_from_ptr(data, ggml_nbytes(tensor));
    ggml_backend_tensor_alloc(buffer, tensor, data);
    return buffer;
}

}  // namespace

extern "C" {

// `poll` is ggml's: how long idle threads spin before they sleep (0 to 100).
Layer * moec_ggml_layer(int experts, int hidden, int inner, int bf16, int threads, int poll,
                        void * gate_up, void * down) {
    auto * layer = new Layer{};
    layer->hidden = hidden;
    layer->inner = inner;
    layer->context = ggml_init({ggml_tensor_overhead() * 4, nullptr, true});
    ggml_type type = bf16 ? GGML_TYPE_BF16 : GGML_TYPE_F32;
    layer->gate_up = ggml_new_tensor_3d(layer->context, type, hidden, 2 * inner, experts);
    layer->down = ggml_new_tensor_3d(layer->context, type, inner, hidden, experts);
    layer->buffers[0] = place(layer->gate_up, gate_up);
    layer->buffers[1] = place(layer->down, down);
    layer->backend = ggml_backend_cpu_init();
    ggml_threadpool_params params = ggml_threadpool_params_default(threads);
    params.poll = poll;
    layer->pool = ggml_threadpool_new(&params);
    ggml_backend_cpu_set_n_threads(layer->backend, threads);
    ggml_backend_cpu_set_threadpool(layer->backend, layer->pool);
    return layer;
}

void moec_ggml_layer_free(Layer * layer) {
    ggml_backend_free(layer->backend);
    ggml_threadpool_free(layer->pool);
    for (ggml_backend_buffer_t buffer : layer->buffers) {
        ggml_backend_buffer_free(buffer);
    }
    ggml_free(layer->context);
    delete layer;
}

// The graph for T tokens and K experts each, with its inputs in place.
Graph * moec_ggml_graph(Layer * layer, int tokens, int top_k, const float * x,
                        const int32_t * ids, const float * weights) {
    auto * g = new Graph{};
    ggml_context * c = ggml_init({ggml_tensor_overhead() * 256 + ggml_graph_overhead(), nullptr,
                                  true});
    g->context = c;
    g->x = ggml_new_tensor_2d(c, GGML_TYPE_F32, layer->hidden, tokens);
    g->ids = ggml_new_tensor_2d(c, GGML_TYPE_I32, top_k, tokens);
    g->weights = ggml_new_tensor_3d(c, GGML_TYPE_F32, 1, top_k, tokens);
    for (ggml_tensor * input : {g->x, g->ids, g->weights}) {
        ggml_set_input(input);
        ggml_set_output(input);  // else its memory is used again within a run
    }
    ggml_tensor * rows = ggml_reshape_3d(c, g->x, layer->hidden, 1, tokens);
    ggml_tensor * both = ggml_mul_mat_id(c, layer->gate_up, rows, g->ids);
    ggml_tensor * halves[2];
    for (int half = 0; half < 2; half++) {
        halves[half] = ggml_view_3d(c, both, layer->inner, top_k, tokens, both->nb[1], both->nb[2],
                                    half * layer->inner * sizeof(float));
    }
    ggml_tensor * h = ggml_swiglu_split(c, halves[0], halves[1]);
    ggml_tensor * each = ggml_mul(c, ggml_mul_mat_id(c, layer->down, h, g->ids), g->weights);
    for (int k = 0; k < top_k; k++) {
        ggml_tensor * one =
            ggml_view_2d(c, each, layer->hidden, tokens, each->nb[2], k * each->nb[1]);
        g->y = k ? ggml_add(c, g->y, one) : top_k == 1 ? ggml_cont(c, one) : one;
    }
    ggml_set_output(g->y);
    g->graph = ggml_new_graph(c);
    ggml_build_forward_expand(g->graph, g->y);
    g->memory = ggml_gallocr_new(ggml_backend_cpu_buffer_type());
    ggml_gallocr_alloc_graph(g->memory, g->graph);
    ggml_backend_tensor_set(g->x, x, 0, ggml_nbytes(g->x));
    ggml_backend_tensor_set(g->ids, ids, 0, ggml_nbytes(g->ids));
    ggml_backend_tensor_set(g->weights, weights, 0, ggml_nbytes(g->weights));
    return g;
}

int moec_ggml_run(Layer * layer, Graph * g) {
    return ggml_backend_graph_compute(layer->backend, g->graph);
}

// Where y [T, H] lies until the next run.
const void * moec_ggml_result(Graph * g) { return g->y->data; }

void moec_ggml_graph_free(Graph * g) {
    ggml_gallocr_free(g->memory);
    ggml_free(g->context);
    delete g;
}
}

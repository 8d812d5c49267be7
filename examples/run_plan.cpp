// Run an engine from C++, without Python and without internvl-edge: the .plan and its sidecar.
//
//   g++ -std=c++17 -O2 run_plan.cpp -I$TENSORRT/include -I$CUDA/include
//       -L$TENSORRT/lib -L$CUDA/lib64 -lnvinfer -lcudart -o run_plan
//   ./run_plan OUT/engines/image_embed.tensorrt-1a2b3c4d.plan
//
// For plans of TensorRT-RTX, take its SDK and -ltensorrt_rtx: the interface is the same.
// An engine is machine code of its vendor, so no byte of it is read by TensorRT before its SHA-256 is
// the sidecar's. That finds a damaged copy; for one from elsewhere, the sidecar's own hash has to be
// that of OUT/manifest.json, and the manifest come from whom you trust.

#include <NvInfer.h>
#include <cuda_runtime_api.h>

#include "sha256.hpp"

#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <memory>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

using namespace nvinfer1;

class Logger : public ILogger {
    void log(Severity severity, char const* text) noexcept override {
        if (severity <= Severity::kWARNING) std::fprintf(stderr, "TensorRT: %s\n", text);
    }
};

void check(cudaError_t status, char const* what) {
    if (status != cudaSuccess)
        throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
}

std::string read(std::string const& path) {
    std::ifstream file(path, std::ios::binary);
    if (!file) throw std::runtime_error(path + ": cannot be read");
    std::ostringstream text;
    text << file.rdbuf();
    return text.str();
}

// What follows "key": in the sidecar, which is JSON that this project wrote; use a parser for more.
char const* find(std::string const& json, std::string const& key) {
    auto at = json.find("\"" + key + "\":");
    if (at == std::string::npos) throw std::runtime_error("sidecar without " + key);
    return json.c_str() + json.find_first_not_of(" [\"\n", at + key.size() + 3);
}

// The usual size of a dimension: the second of the profile's smallest, usual and largest.
int64_t usual(std::string const& json, std::string const& key) {
    char* end = nullptr;
    std::strtoll(find(json, key), &end, 10);
    return std::strtoll(end + 1, nullptr, 10);
}

size_t size_of(DataType type) {
    switch (type) {
        case DataType::kINT64: return 8;
        case DataType::kFLOAT: case DataType::kINT32: return 4;
        case DataType::kHALF: case DataType::kBF16: return 2;
        case DataType::kINT8: case DataType::kUINT8: case DataType::kBOOL: return 1;
        default: throw std::runtime_error("a tensor of a type that this example does not know");
    }
}

size_t elements(Dims const& dims) {
    size_t count = 1;
    for (int i = 0; i < dims.nbDims; ++i) count *= static_cast<size_t>(dims.d[i]);
    return count;
}

struct Tensor {
    std::string name;
    bool is_input;
    DataType type;
    std::vector<char> host;
    void* device = nullptr;

    Tensor(std::string name, bool is_input, DataType type, size_t count)
        : name(std::move(name)), is_input(is_input), type(type), host(count * size_of(type)) {
        check(cudaMalloc(&device, host.size()), "cudaMalloc");
    }
    Tensor(Tensor&& other) noexcept
        : name(std::move(other.name)), is_input(other.is_input), type(other.type),
          host(std::move(other.host)), device(other.device) {
        other.device = nullptr;
    }
    ~Tensor() { cudaFree(device); }
};

void run(std::string const& path) {
    std::string plan = read(path);
    std::string sidecar = read(path.substr(0, path.rfind(".plan")) + ".json");
    if (std::strtoull(find(sidecar, "nbytes"), nullptr, 10) != plan.size())
        throw std::runtime_error(path + ": not as long as its sidecar says; copy it again");
    if (std::string(find(sidecar, "sha256"), 64) != sha256(plan))
        throw std::runtime_error(path + ": not the bytes that its sidecar names; copy it again");

    Logger logger;
    std::unique_ptr<IRuntime> runtime(createInferRuntime(logger));
    if (!runtime) throw std::runtime_error("TensorRT did not start; see its message above");
    std::unique_ptr<ICudaEngine> engine(runtime->deserializeCudaEngine(plan.data(), plan.size()));
    if (!engine)
        throw std::runtime_error(path + ": refused; it was built by TensorRT " +
                                 std::string(find(sidecar, "builder_version"), 10) + ", this is " +
                                 std::to_string(getInferLibVersion()));
    std::unique_ptr<IExecutionContext> context(engine->createExecutionContext());
    if (!context) throw std::runtime_error("no execution context: the GPU has no room");

    cudaStream_t stream;
    check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "cudaStreamCreateWithFlags");

    // Inputs first: shapes of outputs follow from theirs. Symbolic dimensions are the batch, which
    // comes first, and the length of texts; a decoder's cache would need a size of its own.
    int64_t const batch = usual(sidecar, "batch");
    std::vector<Tensor> tensors;
    for (bool inputs : {true, false}) {
        for (int i = 0; i < engine->getNbIOTensors(); ++i) {
            char const* name = engine->getIOTensorName(i);
            if ((engine->getTensorIOMode(name) == TensorIOMode::kINPUT) != inputs) continue;
            Dims dims = inputs ? engine->getTensorShape(name) : context->getTensorShape(name);
            for (int d = 0; d < dims.nbDims; ++d)
                if (dims.d[d] < 0) dims.d[d] = d == 0 ? batch : usual(sidecar, "length");
            if (inputs && !context->setInputShape(name, dims))
                throw std::runtime_error(std::string(name) + ": a shape outside the profile");
            tensors.emplace_back(name, inputs, engine->getTensorDataType(name), elements(dims));
            if (!context->setTensorAddress(name, tensors.back().device))
                throw std::runtime_error(std::string(name) + ": its address was refused");
        }
    }

    // Fill the inputs here: `pixel_values` is float32 [batch, 3, S, S], normalised; zeros are the
    // mean colour. Pinned memory (cudaHostAlloc) would let copies and computation overlap.
    for (Tensor& t : tensors)
        if (t.is_input)
            check(cudaMemcpyAsync(t.device, t.host.data(), t.host.size(), cudaMemcpyHostToDevice,
                                  stream), "copy to the GPU");
    if (!context->enqueueV3(stream)) throw std::runtime_error("the engine failed to start");
    for (Tensor& t : tensors)
        if (!t.is_input)
            check(cudaMemcpyAsync(t.host.data(), t.device, t.host.size(), cudaMemcpyDeviceToHost,
                                  stream), "copy from the GPU");
    check(cudaStreamSynchronize(stream), "the engine");

    for (Tensor const& t : tensors) {
        std::printf("%s %s: %zu bytes", t.is_input ? "in " : "out", t.name.c_str(), t.host.size());
        if (!t.is_input && t.type == DataType::kFLOAT)
            std::printf(", begins with %g", *reinterpret_cast<float const*>(t.host.data()));
        std::printf("\n");
    }
    check(cudaStreamDestroy(stream), "cudaStreamDestroy");
}

int main(int argc, char** argv) {
    try {
        if (argc != 2) throw std::runtime_error("expected one argument, the path of a .plan");
        run(argv[1]);
    } catch (std::exception const& error) {
        std::fprintf(stderr, "error: %s\n", error.what());
        return 1;
    }
}

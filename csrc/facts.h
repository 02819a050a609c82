// What this build is of and for. facts.cpp takes it from a header that setup.py writes, so that a change of one source
// does not compile all of them again.
#pragma once

namespace xmoe {

struct Facts {
    const char* sources;   // digest of csrc/, see megatron_xmoe/_optional.py
    const char* torch;     // version it was built for
    const char* gpu;       // "CUDA 13.0", "HIP 6.4", or "" for the CPU only
    const char* archs;     // GPU architectures, or ""
    const char* compiler;  // of the CPU part
};

const Facts& facts();

}  // namespace xmoe

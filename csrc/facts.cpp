#include "facts.h"

#include "xmoe_built.h"  // written by setup.py

namespace xmoe {

const Facts& facts() {
    static const Facts built{XMOE_SOURCES, XMOE_TORCH, XMOE_GPU, XMOE_ARCHS, __VERSION__};
    return built;
}

}  // namespace xmoe

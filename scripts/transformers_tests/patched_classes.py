"""A pytest plugin: every model of these families, however a test builds it, runs on the ops."""

from mistral_kernels.patch import patch

FAMILIES = ("mistral", "llama", "qwen2", "qwen3")


def pytest_configure(config):
    for family in FAMILIES:
        missing = {"rms_norm", "add_rms_norm", "rope", "swiglu", "attention", "linear_cross_entropy"} - set(
            patch(family).replaced.values()
        )
        if missing:
            raise RuntimeError(f"{family}: {', '.join(sorted(missing))} could not be replaced")

"""A pytest plugin: every model of these families, however a test builds it, runs on the ops."""

from mistral_kernels.patch import OPS, patch

FAMILIES = ("mistral", "llama")


def pytest_configure(config):
    for family in FAMILIES:
        missing = set(OPS) - set(patch(family).replaced.values())
        if missing:
            raise RuntimeError(f"{family}: {', '.join(sorted(missing))} could not be replaced")

"""Makes `lm_eval --model mistral` known to lm-evaluation-harness.

The harness has no entry points of its own (0.4.13), so this is one of torch's, which `import torch` calls: where the
harness is what imports torch, the name is registered; elsewhere nothing happens. This file is no part of a package so
that calling it imports nothing.
"""

import sys


def register() -> None:
    """Registers the name; the class is imported when a run asks for it."""
    if "lm_eval" not in sys.modules:
        return
    try:
        import lm_eval.models  # noqa: F401  # the harness fills its list by itself only while that is empty
        from lm_eval.api.registry import model_registry
    except ImportError:
        return  # a version that keeps models elsewhere: torch must be importable all the same
    if "mistral" not in model_registry:
        model_registry.register("mistral", target="mistral.evaluation.harness:MistralLM")

"""Benchmarks: `python -m bench ops|attention|decode|train-step|model|overhead|window|gpu-report|all|docs`."""

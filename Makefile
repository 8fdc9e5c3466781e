# The only door: everything a developer or CI does goes through here.
# VENV=/path uses an environment that you keep yourself, as it is. ARGS=... goes to the command of `run`, `load` and `bench`.

# What the environment is for: cpu, or cuda (`make gpu`), which brings ONNX Runtime for GPUs.
ACCELERATOR = cpu
VENV = $(if $(filter cuda,$(ACCELERATOR)),.venv-cuda,.venv)
FITS = import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))
PYTHON3 ?= $(shell for p in python3.11 python3.12 python3.13 python3; do $$p -c '$(FITS)' 2>/dev/null && echo $$p && break; done)
BIN = $(VENV)/bin
STAMP = $(VENV)/installed
TORCH = torch==2.13.0
ifeq ($(origin VENV),file)
READY = $(STAMP)
endif
# The tools of the locks have an environment of their own: what they need must not decide what Fleetcast gets.
UV = uv==0.13.9
PIP_AUDIT = pip-audit==2.10.1
TOOLS = .tools
TOOLS_READY = $(TOOLS)/$(UV)-$(PIP_AUDIT)
TORCH_WHEELS = https://download.pytorch.org/whl/cpu/torch/
LOCK = $(TOOLS)/bin/uv pip compile pyproject.toml --python-version 3.11 --python-platform x86_64-manylinux_2_28 \
  --only-binary :all: --generate-hashes --quiet --custom-compile-command "make lock" -c $(TOOLS)/torch.txt
PROTOS = server/front/grpc/protos
SWIFT = swift-proxy-server swift-account-server swift-container-server swift-object-server memcached

# Where the store takes part: what is missing, changed, removed, held up or asked by a prefix. What an archive, a request or
# an operator may do does not depend on the store behind it, nor who dies.
STORE_TESTS = $(patsubst %,tests/e2e/test_%.py,contract store_changes traffic)

# A test process waits for servers during a third of its time, so there are half as many again as cores. A file's tests
# stay in one process, and share what its fixtures start; tests/conftest.py says which files come first.
JOBS ?= $(shell n=$$(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 1); n=$$((n < 4 ? n : 4)); echo $$((n + (n + 1) / 2)))
IN_PARALLEL = -n $(JOBS) --dist loadfile --no-loadscope-reorder

# Tests start hundreds of interpreters; without compiled modules on disk each compiles ours again.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help venv protos run forecast-demo load test-fast test test-s3 test-ray fuzz chaos check format docs docs-site bench bench-code bench-peers bench-ray gpu gpu-steps scale lock audit wheel clean

help: ## what can be done
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "  make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

venv: $(READY) ## the environment .venv, made once and again when pyproject.toml changes

$(STAMP): pyproject.toml handlers/codecs/_quick_numbers.c
	@[ -n "$(PYTHON3)" ] && $(PYTHON3) -c '$(FITS)' || { \
	  echo "Python 3.11, 3.12 or 3.13 is needed: apt-get install python3.11 python3.11-venv, or pyenv; PYTHON3=... names one"; \
	  exit 1; }
	@$(PYTHON3) -c 'import ensurepip, venv' 2>/dev/null || \
	  { echo "$(PYTHON3) has no venv module: apt-get install python3-venv (or python3.11-venv)"; exit 1; }
	$(PYTHON3) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet $(TORCH)
	$(BIN)/python -m pip install --quiet -e '.[$(ACCELERATOR),dev]'
	@touch $@

run: $(READY) ## a fleet, a server, a forecast and a burst; stays until Ctrl-C (ARGS=--once does not)
	@$(BIN)/fleetcast-load demo first-run $(ARGS)

forecast-demo: $(READY) ## a market's cycle: 45 products, joint scenarios, a page; stays (ARGS="--csv prices.csv --time hour")
	@$(BIN)/fleetcast-load demo market-cycle $(ARGS)

load: $(READY) ## percentiles, hit ratio and memory of a fleet under an open-loop load (ARGS="--rate 300 --models 500")
	@$(BIN)/fleetcast-load run $(ARGS)

test-fast: $(READY) ## the unit tests, in one process and within two minutes
	$(BIN)/python -m pytest -m "not (e2e or slow or gpu)" $(ARGS)

test: $(READY) ## all tests, in three processes for two cores, at most six (JOBS=1 for one)
	$(BIN)/python -m pytest $(IN_PARALLEL) $(ARGS)

test-s3: $(READY) ## the tests of stores and processes once more, against OpenStack Swift
	@for program in $(SWIFT); do command -v $$program >/dev/null || \
	  { echo "$$program is missing: apt-get install swift-proxy swift-account swift-container swift-object memcached"; exit 1; }; done
	FLEETCAST_TEST_S3=swift $(BIN)/python -m pytest $(IN_PARALLEL) \
	  tests/model_store/stores $(STORE_TESTS) $(ARGS)

test-ray: $(READY) ## a cluster on real Ray that loses replicas, nodes and its head; minutes, and a gigabyte of packages once
	FLEETCAST_TEST_RAY=1 $(BIN)/python -m pytest -p no:randomly tests/e2e/test_ray.py $(ARGS)

fuzz: $(READY) ## minutes of mutated archives, bodies, frames and requests (SECONDS=60 a target)
	FLEETCAST_FUZZ_S=$(or $(SECONDS),60) $(BIN)/python -m pytest -p no:randomly --timeout 0 -s tests/fuzz $(ARGS)

chaos: $(READY) ## faults of every kind under load, each answer counted; minutes (ARGS="--seed 2 --seconds 60 --out x.json")
	@$(BIN)/python -m tests.chaos.run $(ARGS)

check: $(READY) ## lint, format, types, import arrows, dead code
	$(BIN)/python -m ruff check
	$(BIN)/python -m ruff format --check
	$(BIN)/python -m mypy
	$(BIN)/python -m mypy docker/audit.py docker/dashboard.py docs/write_reference.py docs/write_comparison.py
	$(BIN)/lint-imports
	$(BIN)/python -m vulture

format: $(READY) ## put the code in shape
	$(BIN)/python -m ruff check --fix
	$(BIN)/python -m ruff format

scale: $(READY) ## 10,000 archives and 5,000 residents: does anything grow? minutes, 1 GB, a record
	@$(BIN)/fleetcast-load bench scale $(ARGS)

bench-code: $(READY) ## archives with code beside Multi Model Server, a record; under ten minutes; needs wrk and Java
	@$(BIN)/fleetcast-load bench code $(ARGS)

bench-peers: $(READY) ## the same weights on Triton, Mosec, Ray Serve, TorchServe and others; installs each apart; half an hour
	@$(BIN)/fleetcast-load bench peers $(ARGS)

bench-ray: $(READY) ## a cluster on Ray beside Ray's own multiplexing; twelve minutes
	@$(BIN)/fleetcast-load bench ray $(ARGS)

gpu: ## the first ten minutes on a real GPU: checks, suites, benchmark, a record (makes .venv-cuda)
	@ls /dev/nvidia[0-9]* /dev/dxg >/dev/null 2>&1 || { \
	  echo "no GPU here (/dev/nvidia*): this needs a host, or a container started with --gpus, that has one"; exit 2; }
	@$(MAKE) --no-print-directory gpu-steps ACCELERATOR=cuda

gpu-steps: $(READY)
	@$(BIN)/python -P -m loadtest.benchmarks.first_gpu $(ARGS)

$(TOOLS_READY):
	$(PYTHON3) -m venv $(TOOLS)
	$(TOOLS)/bin/python -m pip install --quiet $(UV) $(PIP_AUDIT)
	@touch $@

lock: $(TOOLS_READY) ## docker/*.lock: the images' packages with hashes (ARGS=--upgrade, TORCH_WHEELS=folder or page)
	@echo "$(TORCH)+cpu" > $(TOOLS)/torch.txt
	$(LOCK) --extra cpu --extra load --extra grpc --find-links "$(TORCH_WHEELS)" -o docker/requirements.lock $(ARGS)
	@echo "$(TORCH)" > $(TOOLS)/torch.txt
	$(LOCK) --extra cuda --extra load --extra grpc -o docker/requirements-cuda.lock $(ARGS)

audit: $(TOOLS_READY) ## known vulnerabilities of what the images install (ARGS=--warn-unreachable without a network)
	@$(TOOLS)/bin/python docker/audit.py $(TOOLS)/bin/pip-audit $(ARGS)

docs: $(READY) ## the generated pages of docs/reference, the comparison's figures, and Grafana's dashboard
	$(BIN)/python docs/write_reference.py
	$(BIN)/python docs/write_comparison.py
	$(BIN)/python docker/dashboard.py > docker/grafana/dashboards/fleetcast.json

docs-site: $(READY) ## the pages of docs/ with a search, in site/index.html; it is read without a network
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet $(ARGS)
	@echo "read it: site/index.html"

wheel: $(READY) ## dist/*.whl with the compiled part, for every Python from 3.11 on; needs a C compiler
	@rm -f dist/fleetcast-*.whl
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir dist .
	@ls dist/fleetcast-*.whl
	@$(BIN)/python -m zipfile -l dist/fleetcast-*.whl | grep -q '_quick_numbers.*\.so' || { \
	  echo "the wheel has no compiled part: apt-get install gcc libc6-dev"; exit 1; }

protos: $(READY) ## the gRPC services' messages, after a change of a .proto file
	cd $(PROTOS) && $(abspath $(BIN))/python -m grpc_tools.protoc -I . --include_imports --descriptor_set_out=descriptors.binpb *.proto

bench: $(READY) ## benchmarks with dated records (ARGS=warm, cold or memory for one of them; needs wrk)
	$(BIN)/fleetcast-load bench core $(or $(ARGS),all)

clean: ## what was made here: environment, demo fleet, caches
	rm -rf .venv .venv-cuda .tools .fleetcast .hypothesis .mypy_cache .ruff_cache .pytest_cache .import_linter_cache build dist site *.egg-info handlers/codecs/*.so
	find . -name __pycache__ -prune -exec rm -rf {} +

# Every target first sets up what it needs in .venv; `make help` lists them.
PYTHON ?= python3
WORKERS ?= 2
REPORT ?= demo-report

BIN := .venv/bin
READY := .venv/.ready
# Tests and benchmarks share few cores with their own workers: one thread each is faster and repeatable.
SINGLE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1

.PHONY: help demo test lint format bench links clean distclean
.DEFAULT_GOAL := help

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(READY) ## Train a small classifier, detector and segmenter and write an HTML report
	$(BIN)/vizoo demo --output $(REPORT)

test: $(READY) ## Run the tests (on a GPU those marked gpu too)
	$(SINGLE_THREAD) $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

lint: $(READY) ## Check style and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy -p vizoo

format: $(READY) ## Format the code and sort the imports
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

bench: $(READY) ## Measure operators and models; results go to benchmarks/results
	$(BIN)/python benchmarks/ops.py
	$(BIN)/python benchmarks/models.py

links: ## Renew the links in typings/ that show the package to type checkers
	find typings/vizoo -type l -delete
	for part in $$(find zoo -mindepth 1 -maxdepth 1 ! -name __pycache__) backbones configs ops train weights; do \
		ln -s ../../$$part typings/vizoo/; done

clean: ## Remove what builds, tests and runs leave behind; .venv stays
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache runs $(REPORT)

distclean: clean ## Remove .venv too
	rm -rf .venv

# OpenCV comes twice, with windows (for mmengine) and without (for albumentations), as one folder `cv2`. The one with windows
# fails to import where the graphics libraries are missing, as on most servers; then the other is laid over it.
$(READY): setup.cfg pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check --editable '.[dev]'
	$(BIN)/python -c 'import cv2' || \
		$(BIN)/python -m pip install --disable-pip-version-check --force-reinstall --no-deps opencv-python-headless
	touch $@

# make demo: the whole chain on real CIFAR-10.   make test: the tests.   make lint: ruff.   All set everything up first.
PYTHON ?= python3
SHELL := /bin/bash
ready := .venv/.ready

.PHONY: demo test lint setup
demo: $(ready)
	.venv/bin/python tiny/demo.py

test: $(ready)
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder tests

lint: $(ready)
	.venv/bin/ruff check .

setup: $(ready)

# What FFCV builds against comes from the system, all else from requirements.txt into .venv.
$(ready): requirements.txt
	@$(PYTHON) -c 'import sys; ok = (3, 10) <= sys.version_info < (3, 14); \
	  ok or print("Python 3.10 to 3.13 is needed, this is", sys.version.split()[0], "- choose another: make demo PYTHON=python3.11"); \
	  sys.exit(not ok)'
	@if ! { pkg-config --exists opencv4 libturbojpeg && command -v c++ && $(PYTHON) -c 'import venv, ensurepip, os, sysconfig; os.stat(sysconfig.get_path("include") + "/Python.h")'; } >/dev/null 2>&1; then \
	  v=$$($(PYTHON) -c "import sys; print(\"python%d.%d\" % sys.version_info[:2])"); \
	  packages="libopencv-dev libturbojpeg0-dev pkg-config build-essential $$v-dev $$v-venv"; \
	  if ! command -v apt-get >/dev/null; then \
	    echo "FFCV needs OpenCV, libjpeg-turbo, pkg-config and a C++ compiler: conda install -c conda-forge opencv libjpeg-turbo pkg-config compilers"; exit 1; fi; \
	  sudo=""; if [ "$$(id -u)" != 0 ]; then \
	    if ! command -v sudo >/dev/null; then \
	      echo "As root: apt-get install $$packages   (without root: conda install -c conda-forge opencv libjpeg-turbo pkg-config compilers)"; exit 1; fi; sudo=sudo; fi; \
	  $$sudo apt-get update && $$sudo env DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends $$packages; \
	fi
	test -x .venv/bin/python || $(PYTHON) -m venv .venv
	.venv/bin/python -m pip install -q -r requirements.txt
	.venv/bin/python -c 'import ffcv.loader'
	touch $(ready)

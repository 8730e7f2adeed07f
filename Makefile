# slidelake: `make demo` and `make test` do everything on a fresh machine; `make help` lists the rest.
.DEFAULT_GOAL := help
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.ONESHELL:
.DELETE_ON_ERROR:
.SILENT:
MAKEFLAGS += --no-print-directory

PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
JAVA := $(if $(JAVA_HOME),$(JAVA_HOME)/bin/)java
DELTA := io.delta delta-spark_2.13 4.0.1
# The newest whose jar is in Maven Central (that of 4.4.1 is not); it is for Spark 4.2.0, and none is for Spark 4.3.
NEWEST_DELTA := io.delta delta-spark_4.2_2.13 4.4.0
export PATH := $(CURDIR)/$(BIN):$(PATH)
export PYSPARK_PYTHON := $(CURDIR)/$(BIN)/python
# importing torch from source takes 15 s a process, from bytecode 3 s
export PYTHONDONTWRITEBYTECODE :=

help:  ## list the targets
	grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 14

# --- set-up: each stamp is newer than what it depends on, so a second call does nothing -------------------------------

setup: $(VENV)/.java $(VENV)/.packages $(VENV)/.spark  ## install what is missing: Java 17, .venv, Spark's jars
.PHONY: help setup demo test cluster-test check bench dist dist-env lock clean

# $(call apt_install,PACKAGE): by apt where the user may, else one line on what is missing.
define apt_install
if [ "$$(id -u)" = 0 ]; then sudo=; elif sudo -n true 2>/dev/null; then sudo="sudo -n"; else
  echo "slidelake needs $(1) and you may not install it here: ask for 'apt-get install $(1)'" >&2; exit 1; fi
echo "installing $(1) ..." >&2
$$sudo apt-get update -qq && $$sudo apt-get install -y -qq $(1) >/dev/null
endef

$(VENV)/.uv: conf/locks/uv.txt
	command -v $(PYTHON) >/dev/null || { echo "slidelake needs $(PYTHON): install it, or say make PYTHON=/path/to/python3.11" >&2; exit 1; }
	if ! $(PYTHON) -c 'import ensurepip, venv' 2>/dev/null; then
	  $(call apt_install,python3.11-venv)
	fi
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r conf/locks/uv.txt
	touch $@

$(VENV)/.packages: $(VENV)/.uv conf/locks/dev.txt pyproject.toml
	echo "installing Python packages (about 7 GB, torch with its CUDA libraries for the most part) ..." >&2
	$(BIN)/uv pip sync --quiet --python $(BIN)/python --require-hashes conf/locks/uv.txt conf/locks/dev.txt
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --no-build-isolation --editable .
	touch $@

# Java 17 or later, what JAVA_HOME or PATH has, else by apt.
$(VENV)/.java: | $(VENV)/.uv
	is_new() { local version=$$({ "$(JAVA)" -version 2>&1 || true; } | sed -n 's/.*version "\([0-9]*\).*/\1/p'); [ "$${version:-0}" -ge 17 ]; }
	if [ -n "$(JAVA_HOME)" ] && ! is_new; then
	  echo "JAVA_HOME=$(JAVA_HOME) has no Java 17 or later: unset JAVA_HOME or point it at Java 17" >&2; exit 1
	fi
	if ! is_new; then
	  $(call apt_install,openjdk-17-jre-headless)
	fi
	is_new || { echo "$$(command -v java) is still older than Java 17: put Java 17 first on PATH or point JAVA_HOME at it" >&2; exit 1; }
	touch $@

# $(call complete_spark,SPARK_HOME,GROUP ARTIFACT VERSION)
define complete_spark
conf/spark/jars.sh $(1) conf/locks/jars.sha256 $(2)
mkdir -p $(1)/conf
ln -sf $(CURDIR)/conf/spark/local.conf $(1)/conf/spark-defaults.conf
ln -sf $(CURDIR)/conf/log4j2.properties $(1)/conf/log4j2.properties
endef

# Delta's jars from Maven Central by coordinates (Ivy keeps them in ~/.ivy2), checked, beside Spark's own; and Spark's
# defaults of this place, so that a bare `spark-submit jobs/JOB.py` finds both.
$(VENV)/.spark: $(VENV)/.packages $(VENV)/.java conf/spark/jars.sh conf/locks/jars.sha256 conf/spark/local.conf conf/log4j2.properties
	spark=$$($(BIN)/python -c 'import pathlib, pyspark; print(pathlib.Path(pyspark.__file__).parent)')
	rm -f $$spark/jars/delta-*.jar
	$(call complete_spark,$$spark,$(DELTA))
	touch $@

# The Azure blob server that tests read from; a program of Node.
$(VENV)/.azurite: conf/locks/azurite/package-lock.json | $(VENV)/.uv
	if ! command -v npm >/dev/null; then
	  $(call apt_install,npm)
	fi
	echo "installing Azurite ..." >&2
	mkdir -p $(VENV)/azurite
	cp conf/locks/azurite/package.json conf/locks/azurite/package-lock.json $(VENV)/azurite/
	npm ci --prefix $(VENV)/azurite --ignore-scripts --no-audit --no-fund --loglevel=error >/dev/null
	touch $@

# The newest Spark that there is a Delta for, and pyarrow and NumPy as new as they get without petastorm: tests put them before
# those of .venv, for jobs and feed have to work there, too. Pandas 3 is new to Spark 4.2, which warns of it.
$(VENV)/.newest: conf/locks/newest-spark.txt $(VENV)/.java conf/spark/jars.sh conf/locks/jars.sha256 conf/spark/local.conf | $(VENV)/.uv
	echo "installing the newest Spark and pyarrow beside .venv's own ..." >&2
	rm -rf $(VENV)/newest
	$(BIN)/uv pip install --quiet --python $(BIN)/python --require-hashes --target $(VENV)/newest -r conf/locks/newest-spark.txt
	$(call complete_spark,$(VENV)/newest/pyspark,$(NEWEST_DELTA))
	touch $@

# YARN's daemons for the tests, from Maven Central as Delta's jars are; all of them, and no others, as locked.
$(VENV)/.hadoop: conf/locks/hadoop/ivy.xml conf/locks/hadoop/jars.sha256 $(VENV)/.packages $(VENV)/.java
	echo "installing Hadoop's YARN (80 MB) ..." >&2
	rm -rf $(VENV)/hadoop
	"$(JAVA)" -cp "$$(echo $(VENV)/lib/python3*/site-packages/pyspark/jars/ivy-*.jar)" org.apache.ivy.Main -warn \
	  -ivy conf/locks/hadoop/ivy.xml -retrieve "$(VENV)/hadoop/[artifact]-[revision].[ext]" >/dev/null \
	  || { echo "Hadoop's jars cannot be had from Maven Central" >&2; exit 1; }
	(cd $(VENV)/hadoop && LC_ALL=C && sha256sum *.jar) | diff - conf/locks/hadoop/jars.sha256 >&2 \
	  || { echo "Hadoop's jars (<) are not those of conf/locks/hadoop/jars.sha256 (>)" >&2; exit 1; }
	touch $@

COMPILE := $(BIN)/uv pip compile --quiet --generate-hashes --no-annotate --custom-compile-command "make lock" --upgrade \
  --python-version 3.11 --python-platform x86_64-manylinux_2_28

lock:  ## resolve the newest versions that pyproject.toml allows
	$(COMPILE) --constraint conf/locks/constraints.txt \
	  --extra spark --extra train --extra mlflow --extra demo --extra azure --extra s3 --extra openslide --extra openvino --extra bench --group dev pyproject.toml -o conf/locks/dev.txt
	$(COMPILE) --constraint conf/locks/dev.txt \
	  --extra spark --extra train --extra mlflow --extra azure --extra s3 --extra gcs --extra openslide --extra openvino pyproject.toml -o conf/locks/runtime.txt
	printf '%s\n' delta-spark==$(lastword $(NEWEST_DELTA)) 'pandas<3' numpy pyarrow | $(COMPILE) - -o conf/locks/newest-spark.txt
	npm install --prefix conf/locks/azurite --package-lock-only --omit-lockfile-registry-resolved --ignore-scripts --no-audit \
	  --no-fund --loglevel=error

# --- what a cluster needs ----------------------------------------------------------------------------------------------

VERSION := $(shell sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)
WHEEL := dist/slidelake-$(VERSION)-py3-none-any.whl
# with folders, whose times tell of files that went
SOURCES := $(shell find jobs udfs -name __pycache__ -prune -o \( -type d -o -name '*.py' \) -print)

dist: dist/slidelake-$(VERSION).zip dist/requirements.txt  ## what a cluster needs: the code as zip and wheel, the lock
dist-env: dist dist/environment.tar.gz  ## also the packages as an archive, for nodes that have none (3.5 GB, two minutes)

$(WHEEL): $(VENV)/.packages $(SOURCES) pyproject.toml README.md LICENSE conf/spark/local.conf conf/log4j2.properties
	hatchling build -t wheel -d dist >/dev/null

# Spark puts .zip on the path of Python workers, .whl it does not; a wheel is a zip of packages and what is known of them.
dist/slidelake-$(VERSION).zip: $(WHEEL)
	cp $< $@

dist/requirements.txt: conf/locks/runtime.txt
	mkdir -p dist
	cp $< $@

# Spark itself is where the archive goes.
dist/environment.tar.gz: conf/locks/runtime.txt | $(VENV)/.packages
	mkdir -p dist
	rm -rf build/env
	python -m venv --without-pip build/env
	uv pip sync --quiet --python build/env/bin/python --require-hashes conf/locks/runtime.txt
	venv-pack --quiet --force --compress-level 1 --exclude '*/pyspark/jars/*' --prefix build/env --output $@
	rm -rf build/env

# --- what people run ---------------------------------------------------------------------------------------------------

demo: setup  ## from a real slide and a small cohort made from it to predictions: every job once
	python -m tests.slides.demo data/demo
	if [ ! -f data/demo/stainnet.pth ]; then
	  spark-submit jobs/slides.py --config conf/demo.yaml output.root=data/demo/fit on_failed_slides=ignore
	  spark-submit jobs/stainnet.py --config conf/demo.yaml output.root=data/demo/fit
	fi
	spark-submit jobs/preprocess.py --config conf/demo.yaml
	spark-submit jobs/splits.py --config conf/demo.yaml
	slidelake train --config conf/demo.yaml
	models=(data/demo/tables/models/*)
	spark-submit jobs/predict.py --config conf/demo.yaml patients=data/demo/new.csv predict.model="$${models[-1]}"
	csv="data/demo/tables/predictions_csv/$$(basename "$${models[-1]}").csv"
	printf '\n%s:\n' "$$csv"
	cat "$$csv"
	printf '\n%s\n' "Seven patients are too few to mean anything: the figures of train and predict show that it works, not how well."

test: setup $(VENV)/.azurite $(VENV)/.newest  ## the whole test suite
	python -m pytest

cluster-test: setup $(VENV)/.azurite $(VENV)/.newest $(VENV)/.hadoop  ## the same and the tests on YARN, in one run
	python -m pytest -m ''

check: setup  ## format, lint, types, import contracts
	ruff format --check .
	ruff check .
	mypy
	lint-imports

bench: setup  ## benchmarks, all but the longest or ONLY=name,name
	python -m benchmarks $(if $(ONLY),--only $(ONLY))

clean:  ## remove what demo and benchmarks wrote
	rm -rf data/demo data/bench

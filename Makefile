# Three commands: `make demo` draws pictures with the embedded model, `make serve` draws them for others over HTTP,
# `make test` passes the tests.
# Needs Python >= 3.11 and make. Everything is installed into .venv with the versions of constraints.txt.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo serve test test-slow lint docs bench report fuzz clean

demo: $(STAMP)
	$(BIN)/python scripts/demo.py -o demo

# make serve OPTIONS="--port 9000 --transparent"; see docs/serving.md
serve: $(STAMP)
	$(BIN)/diffusion-accel serve $(OPTIONS)

test: $(STAMP)
	$(BIN)/python -m pytest -n 2 --dist worksteal

# what `make test` leaves out; Ray is installed for it
test-slow: $(STAMP)
	$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e ".[test,ray]"
	$(BIN)/python -m pytest -n 2 --dist worksteal -m slow

lint: $(STAMP)
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy diffusion_accel pipelines quant parallel \
	  && $(BIN)/python scripts/floors.py

# the site, into runs/site; a page that is in no menu, a link or an anchor that leads nowhere fails it
docs: $(STAMP)
	$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e ".[docs]"
	$(BIN)/python -m mkdocs build --quiet --strict

# files broken on purpose, every kind in turn: make fuzz MINUTES=10 (each), KIND=folder
fuzz: $(STAMP)
	$(BIN)/python scripts/fuzz.py $(or $(KIND),all) --minutes $(or $(MINUTES),2)

# the table of docs/reuse.md; other packages are a part of it once they are installed: make bench PEERS=1
BENCH ?= family:tuned:ddim $(addprefix reuse:,hold:2 hold:3 deepcache:3 faster-diffusion) \
  $(if $(PEERS),deepcache:3 deepcache:5 tomesd tgate:25 pab:2) $(addprefix fewer-steps:,25 17 12 10 15,dpm++ 12,dpm++ 10,dpm++)
bench: $(STAMP)
	$(if $(PEERS),$(BIN)/python -m pip install -qq --disable-pip-version-check --no-deps tomesd tgate)
	mkdir -p runs
	$(BIN)/diffusion-accel bench $(BENCH) --scheduler ddim --steps 50 --count 24 --seed 1000 --html runs/bench.html -o runs/bench.json --overwrite

# one page of all numbers in docs/data and of those measured here (runs/*.json): runs/report.html
report: $(STAMP)
	$(BIN)/python scripts/report.py

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "diffusion-accel needs Python 3.11 or newer; $(PYTHON) is" $$($(PYTHON) -V 2>&1) "- set PYTHON=…" >&2; exit 2; }
	@echo "installing into $(VENV), once: it takes some minutes, most of them for torch"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	# torch first and pinned: without a pin another package would draw in a larger build of it
	$(BIN)/python -m pip install -qq --disable-pip-version-check "torch==$$(sed -n 's/^torch==//p' constraints.txt)"
	$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e ".[test,lint]"
	touch $(STAMP)

clean:
	rm -rf $(VENV) demo build dist *.egg-info

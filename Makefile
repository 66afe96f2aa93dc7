# make demo: from nothing to a scored model, on built-in data.   make test: everything CI checks.
# make board: the leaderboard's pages anew.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin

.PHONY: demo test lint board clean

$(VENV)/.ready: setup.cfg pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --editable .[test]
	touch $@

# MREF on hand-drawn strokes: it learns within the minutes that a demo has.
demo: $(VENV)/.ready
	$(BIN)/mnistattn generate --variant mref --digits strokes --out data/demo --overwrite \
	    --train 7000 --val 500 --test 1000
	$(BIN)/mnistattn show data/demo --out data/demo/sheet.png
	$(BIN)/mnistattn evaluate --model ctx --data data/demo --epochs 7 --batch-size 16 --lr 0.002 \
	    --queries fresh --out runs/demo
	@echo "See data/demo/sheet.png and runs/demo/picture.png"

# A process a core, but no more than 4. Files in their order: by their numbers of tests, the longest
# would come last. A process that dies, as of a test that hangs, is not replaced: its file would be
# run again, and again.
test: $(VENV)/.ready lint
	$(BIN)/pytest --numprocesses logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder \
	    --max-worker-restart 0

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# LEADERBOARD.md and the page, of the results in leaderboard/; a test says if they are stale.
board: $(VENV)/.ready
	$(BIN)/mnistattn leaderboard leaderboard --check
	$(BIN)/mnistattn leaderboard leaderboard --format markdown --out LEADERBOARD.md \
	    --html leaderboard/index.html
	$(BIN)/mnistattn score --schema > docs/result.schema.json

clean:
	find . -name __pycache__ -prune -exec rm -rf {} +
	rm -rf build *.egg-info .pytest_cache .ruff_cache .mypy_cache

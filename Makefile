# make quickstart   install, train, compare with the frozen backbone, map a generated GeoTIFF
# make demo-tracking   install, adapt a tracker to a kind of clip that it never saw, follow such clips
# make test         install what is missing, then the whole suite
PYTHON ?= python3
BIN := .venv/bin
# the folders datasets/ and kernels/ must never hide the PyPI packages of those names
export PYTHONSAFEPATH := 1

.PHONY: install quickstart demo-tracking test lint
install: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || \
	  { echo "error: $(PYTHON) is not Python 3.11, 3.12 or 3.13; type: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 2; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || \
	  { echo "error: Python's venv module is missing; type: apt install python3-venv (or your system's package of it)" >&2; exit 2; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

# --no-deps: these want opencv-python, which would own cv2/ beside albumentations' opencv-python-headless; what else
# they want is in the extra dev. No compiled operations: those take an hour.
.venv/mmseg: .venv/installed
	MMCV_WITH_OPS=0 $(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt --no-deps \
	  onedl-mmengine onedl-mmcv onedl-mmsegmentation
	@touch $@

quickstart: install
	$(BIN)/python tools/quickstart.py format=json

demo-tracking: install
	$(BIN)/python tools/demo_tracking.py format=json

test: .venv/mmseg
	$(BIN)/python -m pytest -n auto --maxprocesses=4 --dist=worksteal

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python tools/typing_tree.py
	$(BIN)/mypy

# Sourced by scripts/demo and scripts/test: makes .venv with the CPU build of torch and csulora in it.
# Where scripts/test runs as root on Debian, it also installs the packages chromium and chromium-driver.
# Environment: PYTHON names the Python to use (3.11 or later). A torch already in .venv is kept.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

find_python() {
  local candidate
  for candidate in "${PYTHON:-}" python3 python3.13 python3.12 python3.11 python; do
    if [ -n "$candidate" ] && command -v "$candidate" >/dev/null 2>&1 \
      && "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  echo "csulora needs Python 3.11 or later; set PYTHON to one." >&2
  return 1
}

install_torch() {
  .venv/bin/python -c 'import torch' 2>/dev/null && return
  local version=2.13.0
  echo "installing torch $version, CPU build ..." >&2
  # The plain package pulls several GB of CUDA libraries on Linux. Take a CPU build where pip knows one, else let uv
  # find it.
  if ! .venv/bin/python -m pip install -qq "torch==$version+cpu" 2>/dev/null; then
    .venv/bin/python -m pip install -qq uv
    .venv/bin/python -m uv pip install -qq --python .venv/bin/python --torch-backend cpu "torch==$version"
  fi
}

install() { # install EXTRAS
  [ -x .venv/bin/python ] || "$(find_python)" -m venv .venv
  install_torch
  echo "installing csulora$1 ..." >&2
  .venv/bin/python -m pip install -qq --constraint scripts/constraints.txt --editable ".$1"
}

install_chromium() { # for the tests that open report pages; Debian's, where we may install packages
  command -v chromium >/dev/null && command -v chromedriver >/dev/null && return
  if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
    echo "no chromium and chromedriver here: the tests that open report pages are skipped (with CI=true they fail)" >&2
    return
  fi
  echo "installing chromium ..." >&2
  apt-get update -qq >&2 || true
  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium chromium-driver fonts-dejavu-core \
    >/dev/null || echo "chromium could not be installed: the tests that open report pages are skipped (with CI=true they fail)" >&2
}

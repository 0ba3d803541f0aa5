"""Speed against a plain implementation of the same maths: python -m bench [quick=true] [json=PATH]."""

import sys
from pathlib import Path
from types import ModuleType

# torch-fidelity installs a package named `tests`, which would hide tests/reference of this repository.
if "tests" not in sys.modules:
    sys.modules["tests"] = ModuleType("tests")
    sys.modules["tests"].__path__ = [str(Path(__file__).resolve().parents[1] / "tests")]

"""A config file is a Python module."""

import hashlib
import importlib.util
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jaxmoe.errors import UserError


def import_file(path: Path, option: str = "--config") -> Any:
    """Raises UserError with what went wrong in it; `option` is how the user named it."""
    if path.suffix != ".py":
        raise UserError(f"{option} {path}: a config is a Python file, named *.py")
    # Named by location, so that two files of the same stem do not collide in sys.modules.
    name = "jaxmoe_config_" + hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:8]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    folder = str(path.resolve().parent)
    sys.path.insert(0, folder)  # a config may import its parents from the same folder
    try:
        spec.loader.exec_module(module)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{option} {path}: {type(error).__name__}: {error}") from error
    finally:
        sys.path.remove(folder)
    return module


def call(function: Callable[[], Any], where: str) -> Any:
    """What a function of such a file returns; raises UserError with the line that went wrong."""
    try:
        return function()
    except UserError:
        raise
    except Exception as error:
        line = traceback.extract_tb(error.__traceback__)[-1].lineno
        raise UserError(f"{where}, line {line}: {type(error).__name__}: {error}") from error

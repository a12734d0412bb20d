"""The `vitzoo` command: errors that a user can put right are one sentence and exit code 2.

Nothing outside the base installation is imported before that sentence can be printed.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence

from vitzoo.errors import InputError

# Top-level package -> the extra that brings it.
EXTRAS = {
    "accelerate": "train",
    "matplotlib": "train",
    "omegaconf": "train",
    "rich": "train",
    "sklearn": "train",
    "typer": "train",
    "yaml": "train",
    "segmentation_models_pytorch": "seg",
    "pycocotools": "det",
    "skimage": "det",
    "onnx": "export",
    "onnxruntime": "export",
    "onnxscript": "export",
    "openvino": "export",
    "torchao": "export",
    "torchmetrics": "det",
    "gradio": "demo",
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command and exit.

    Args:
        arguments: of the command line; the process's own if None.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("vitzoo: %(message)s"))
    logging.getLogger("vitzoo").addHandler(handler)
    sys.exit(run(given))


def run(arguments: list[str]) -> int:
    """Run a command; returns the exit code: 0, 2 for wrong input, 130 for an interrupt."""
    from vitzoo.tasks.contract import UnreadableSample

    try:
        from vitzoo.commands import app

        return app(arguments)
    except (InputError, UnreadableSample) as error:
        return _say(str(error))
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in EXTRAS:
            raise
        return _say(
            f"this command needs {package!r}, which is not installed: "
            f"pip install vitzoo[{EXTRAS[package]}]"
        )
    except KeyboardInterrupt:
        goes_on = arguments[:1] == ["train"]
        _say("stopped" + "; the same command goes on from the last checkpoint" * goes_on)
        return 130
    except BrokenPipeError:
        return 141
    except OSError as error:
        return _say(f"{error.strerror}: {error.filename}" if error.filename else str(error))


def _say(sentence: str) -> int:
    sys.stderr.write(f"vitzoo: {sentence}\n")
    return 2


if __name__ == "__main__":
    main()

"""Libraries that talk while models are built and loaded by the dozen, kept quiet for a while."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet() -> Iterator[None]:
    """Without the notices, future warnings and progress bars of the model libraries; afterwards as before.

    Their bars are about loading a single model; ours count models, layers and steps. Errors still come through.
    """
    import transformers

    notices = [transformers.utils.logging]
    if "diffusers" in sys.modules:
        notices.append(sys.modules["diffusers"].utils.logging)
    levels = [(library, library.get_verbosity(), library.is_progress_bar_enabled()) for library in notices]
    datasets = sys.modules.get("datasets")
    tables = datasets is not None and datasets.are_progress_bars_disabled() is False
    for library, _, bars in levels:
        library.set_verbosity_error()
        if bars:
            library.disable_progress_bar()
    if tables:
        datasets.disable_progress_bars()  # type: ignore[union-attr]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # between the libraries, nothing of the user's
            warnings.simplefilter("ignore", UserWarning)
            yield
    finally:
        for library, level, bars in levels:
            library.set_verbosity(level)
            if bars:
                library.enable_progress_bar()
        if tables:
            datasets.enable_progress_bars()  # type: ignore[union-attr]

"""An adapter written for a program that is not ours, checked by what that program makes of it."""

from __future__ import annotations

from adapters.readers import Exporter

# The reader's name -> who writes for it: function(folder, out, options) -> ExportReport.
TARGETS: dict[str, Exporter] = {}

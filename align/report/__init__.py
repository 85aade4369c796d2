"""Reports of alignment as figures and pages: mass kept and NLL added; one segment in detail."""

"""Local folders and object storage, and safe reading of files that may be damaged or hostile."""

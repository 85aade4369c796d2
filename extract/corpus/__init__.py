"""From input files of any format to documents, checked and assigned to splits."""

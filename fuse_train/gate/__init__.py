"""How much of its weight the fusion loss keeps, domain by domain, as training goes."""

"""What alignment keeps and costs, as figures and as pages; one segment looked at closely."""

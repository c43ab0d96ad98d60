"""Students: the solution operator in its forms, and readers of published students."""

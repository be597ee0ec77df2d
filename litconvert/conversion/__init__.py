"""From a recognised source to a student: planned tensor by tensor, then written."""

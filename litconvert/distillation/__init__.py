"""What a student learns from its teacher, and training without one."""

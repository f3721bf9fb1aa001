"""What a body may hold, looked at before anything parses it."""

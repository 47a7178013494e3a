"""What `dblock demo` shows: many tenants, steps a and c side by side, step b in single file, on a real PostgreSQL."""

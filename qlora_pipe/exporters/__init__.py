"""Writing what other tools read: state in, files out."""

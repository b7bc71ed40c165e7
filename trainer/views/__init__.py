"""What people look at: logs, curves, previews, grids and the report."""

"""What people look at: tables, pictures, the model card and a page."""

"""What web.py shows, without the page: thumbnails, filters, predictions, search, and their HTML."""

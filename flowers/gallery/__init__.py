"""What web.py shows, without the page itself. Nothing here knows of Streamlit. Read in this order:

address.py      what a visitor has chosen, the same on the page and in its address
colours.py      colour features, palette and HSV curves of one picture
thumbnails.py   small pictures and colour features of the whole dataset; pictures of visitors
predictions.py  what runs predicted, and how two runs differ
filters.py      file ids, splits, and the list that a visitor downloads
atlas.py        a map of all images
search.py       the nearest images, by colour or by a run's model
overview.py     all runs in one table
relevance.py    where a run's model looks
panels.py       HTML of grids, charts and rankings, shown with page.css and page.js

The first view of the page must not wait for torch or pandas: they are imported where they are used.
"""

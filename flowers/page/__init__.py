"""The page itself, made with Streamlit; web.py puts it together. Read in this order:

kept.py        what stays in memory from one run of web.py to the next, for all visitors
choices.py     what a visitor has chosen, and what can be
widgets.py     pieces that the views share: buttons, lists, grids of pictures, downloads
browse.py      the view Browse
runs.py        the view Runs: all of them in one table
comparison.py  of one run or several: accuracies, and the pictures by what they say
classes.py     of one run or two: the table of classes, and the confusion matrix
search.py      the view Search
map.py         the view Map
image.py       one image, instead of the grid of a view
"""

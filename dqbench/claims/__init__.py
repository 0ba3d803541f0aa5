"""What papers claim, as comparisons of rows that differ in what a claim is about; verdicts come from rows alone.

book.py       published/claims.yaml -> claims -> comparisons of two cells each
verdicts.py   comparisons, rows -> paired t tests over seeds
sheets.py     tests -> lines of text
page.py       lines -> results/tables/claims.md, claims.csv
section.py    lines -> a section of an HTML page
"""

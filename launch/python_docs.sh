# Sourced by the scripts that train on real text without a network: the documentation in Python's standard library, as
# a data set in $data, which is made where it is not there.
data=data/python-docs

if [ -f "$data/manifest.json" ]; then
    python -m data_prep verify "$data" || fail "$data is damaged: delete it and start again"
elif [ -e "$data" ]; then
    fail "$data is no data set (it has no manifest.json): delete it and start again"
else
    say "Tokenizing the standard library's documentation"
    # Aside, so that what an interruption leaves is never taken for the data set.
    rm -rf "$data.partial"
    python -m data_prep --source python-docs --out "$data.partial"
    mv "$data.partial" "$data"
fi

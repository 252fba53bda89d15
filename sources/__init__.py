"""Where images come from: file formats, packed copies, drawn and composed scenes, downloads. data.py is the
door."""

"""Other people's weight files: which tensor there is which parameter here. numpy only, no torch."""

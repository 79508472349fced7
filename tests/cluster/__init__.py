"""`script/cluster`: counting and comparing, and the whole of it in small."""

"""One room per op: the public function, its reference, and its backends."""

"""What each op means (`reference`), and which implementation of it runs (`table`)."""

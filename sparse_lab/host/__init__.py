"""What the operating system gives, and refuses: files, locks, room on disks, the console, processes, the machine."""

"""Images and video files at the edge: uint8 RGB arrays inside, untrusted files outside.

- `probe`: what a video is, without decoding more than its first frame.
- `decode`: frames of a video, GIF, image folder or stacked-frame image, as an iterator.
- `encode`: frames to H.264.
- `ffmpeg`: the one command-line job, for sound and for files that cannot be seeked.
- `images`: single pictures.

Whatever is wrong with a file is a `MediaError` with a stable code.
"""

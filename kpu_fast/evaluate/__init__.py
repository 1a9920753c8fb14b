"""What a student can do, measured: `python -m kpu_fast.evaluate --help`.

From Python, one function per file and evaluation: `zero_shot.zero_shot`, `knn.knn`, `linear.linear`,
`segment.segment`, `detect.detect`, `std_gap.std_gap`, `pca.pca`, over what `encoder.load_encoder` and
`detect.load_detector` load; `detector.with_student_backbone` puts a student into a GroundingDINO.
"""

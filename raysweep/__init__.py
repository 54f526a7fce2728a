"""raysweep: of many ways to pretrain, which checkpoint will fine-tune best?"""

cd /tmp/bye_x
nice -n 5 ./py base.py /tmp/bye_x/b5 '{"model":{"image_size":56},"s":{"batch_size":8},"size":6,"ad":0.2}' >b5.out 2>&1
nice -n 5 ./py ft.py /tmp/bye_x/b5 '{"s":{"epochs":2,"lr":2e-3,"projector_lr":1e-3,"dropout":0}}' > f5a.out 2>&1
nice -n 5 ./py ft.py /tmp/bye_x/b5 '{"s":{"epochs":3,"lr":1e-3,"projector_lr":1e-3,"dropout":0}}' >f5b.out 2>&1

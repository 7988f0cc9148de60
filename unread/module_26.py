def function_26(x):
    return x + 26
def function_26(x):
    return x + 26
def function_26(x):
    return x + 26
def function_26(x):
    return x + 26
def function_26(x):
    return x + 26
